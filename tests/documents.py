"""What stands in the documents, taken apart: code blocks, commands, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^```(\w*)\s*$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")


@dataclass(frozen=True)
class Block:
    """A code block: fenced (with its language) or indented (language ``indented``)."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    """README, changelog, and the pages of docs/ and samples/."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *(ROOT / "samples").glob("**/*.md")]
    return sorted(page for page in pages if "egg-info" not in str(page))


def blocks(document: Path) -> list[Block]:
    """Code blocks of a page in order."""
    found: list[Block] = []
    kept: list[str] = []
    begun, language = 0, ""
    fenced = False
    before = ""
    for number, line in enumerate([*document.read_text(encoding="utf-8").splitlines(), ""], 1):
        fence = _FENCE.match(line)
        indented = line.startswith("    ") and (language == "indented" or not before.strip())
        if fenced and not (fence and not fence[1]):
            kept.append(line)
        elif fence or (language == "indented" and not indented and line.strip()) or (indented and not language):
            if kept:
                found.append(Block(document, begun, language, "\n".join(kept).rstrip()))
            kept, begun = [], number + (1 if fence else 0)
            fenced = bool(fence) and not fenced
            language = (fence[1] or "text") if fence and fenced else "indented" if indented else ""
            if indented:
                kept.append(line[4:])
        elif language == "indented":
            kept.append(line[4:])
        before = line
    if kept:
        found.append(Block(document, begun, language, "\n".join(kept).rstrip()))
    return found


def commands(document: Path) -> Iterator[tuple[str, str]]:
    """Every ``eexform ...`` line of the code blocks: (where, command without comment), continued lines joined."""
    for block in blocks(document):
        if block.language not in ("indented", "sh", "bash", "console"):
            continue
        text = re.sub(r"\\\n\s*", " ", block.text)
        for line in text.splitlines():
            command = re.sub(r"\s+#.*$", "", line).strip().removeprefix("$ ")
            if command.startswith("eexform "):
                yield str(block), command


def inline(document: Path) -> list[str]:
    """Inline code outside of code blocks."""
    text = document.read_text(encoding="utf-8")
    for block in blocks(document):
        text = text.replace(block.text, "")
    text = re.sub(r"^(    .*|```.*)$", "", text, flags=re.MULTILINE)
    return [" ".join(found.split()) for found in _INLINE.findall(text)]


def links(document: Path) -> list[str]:
    """Targets of links that stay inside the repository."""
    text = document.read_text(encoding="utf-8")
    return [target for target in _LINK.findall(text) if not re.match(r"[a-z]+:", target)]


def anchors(document: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
