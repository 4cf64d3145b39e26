"""Device files: the bundled ones are complete, and wrong ones are refused with file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from eexform.cost_models._device import Device, devices, listing, load_device
from eexform.errors import OptionError

DEVICE: dict[str, Any] = {
    "name": "mine",
    "title": "my board",
    "compute": {"peak_gflops_float32": 10.0, "threads": 1},
    "memory": {"bandwidth_gb_per_s": 5, "cache_kib": 32},
    "kernel": {"launch_us": 0.0, "channel_block": 4},
    "sources": {
        "compute.peak_gflops_float32": "data sheet",
        "memory.bandwidth_gb_per_s": "measured",
        "memory.cache_kib": "data sheet",
        "kernel.launch_us": "measured",
        "kernel.channel_block": "data sheet",
    },
}


def changed(**sections: Any) -> dict[str, Any]:
    plain = json.loads(json.dumps(DEVICE))
    for section, values in sections.items():
        if isinstance(values, dict) and isinstance(plain.get(section), dict):
            plain[section] |= values
        else:
            plain[section] = values
    return plain


@pytest.mark.parametrize("name", devices())
def test_bundled_devices_have_a_source_for_every_figure(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    plain = device.to_json()
    figures = {f"{part}.{key}" for part, values in plain.items() if isinstance(values, dict) for key in values}
    figures = {key for key in figures if not key.startswith("sources.")} - {"compute.threads"}
    assert figures <= set(device.sources)
    assert Device.from_json(plain, name) == device


def test_bundled_devices_are_all_there() -> None:
    kinds = {"cortex-m4", "cortex-m7", "rpi4", "rpi5", "jetson-orin-nano", "xeon", "a100"}
    assert kinds <= set(devices())
    assert [plain["name"] for plain in listing()] == list(devices())
    for name in ("cortex-m4", "cortex-m7"):  # limits of what fits
        memory = load_device(name).memory
        assert memory.ram_bytes
        assert memory.flash_bytes


def test_files(tmp_path: Path) -> None:
    toml = tmp_path / "mine.toml"
    toml.write_text(tomli_w.dumps(DEVICE))
    calibration = tmp_path / "mine.json"
    calibration.write_text(json.dumps({"format": 1, "device": DEVICE, "table": []}))
    device = load_device(str(toml))
    assert device == load_device(calibration)
    assert device.peak("float32") == 10.0
    assert device.peak("int8") is None
    assert device.memory.bandwidth_gb_per_s == 5.0
    assert "efficiency.conv" in device.assumed()
    assert "kernel.launch_us" not in device.assumed()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(compute={"peak_gflop_float32": 1.0}), "unknown key 'compute.peak_gflop_float32': did you mean"),
        (changed(speed={"a": 1}), "unknown key 'speed'"),
        (
            changed(compute={"peak_gflops_float32": "fast"}),
            "'compute.peak_gflops_float32' must be a number, found 'fast'",
        ),
        (changed(compute={"peak_gflops_float32": True}), "'compute.peak_gflops_float32' must be a number"),
        (changed(memory={"bandwidth_gb_per_s": 0}), "'memory.bandwidth_gb_per_s' must be positive, found 0"),
        (changed(kernel={"launch_us": -1.0}), "'kernel.launch_us' must be positive"),
        (changed(kernel={"channel_block": 4.5}), "'kernel.channel_block' must be a whole number"),
        (changed(memory={"bandwidth_gb_per_s": float("inf")}), "'memory.bandwidth_gb_per_s' must be a number"),
        (changed(compute={"peak_gflops_float32": 10**400}), "'compute.peak_gflops_float32' must be a number"),
        (changed(memory={"ram_bytes": 10**400}), "'memory.ram_bytes' must be a whole number"),
        (changed(memory=7), r"\[memory\] must be a table, found 7"),
        ({key: value for key, value in DEVICE.items() if key != "memory"}, r"\[memory\] must be a table"),
        (changed(compute={}) | {"compute": {"threads": 1}}, "'compute.peak_gflops_float32' is missing"),
        (changed(title=""), "key 'title' must be a text"),
        (changed(efficiency={"conv": 0.5}), "key 'efficiency.conv' has no source"),
        (
            changed(sources={"kernel.call_us": "x"}),
            "'sources.kernel.call_us' is about a key that the file does not have",
        ),
        (changed(sources={"kernel.launch_us": ""}), "'sources.kernel.launch_us' must be a text"),
    ],
)
def test_wrong_content_is_refused_with_file_and_key(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(content))
    with pytest.raises(OptionError, match=message) as caught:
        load_device(path)
    assert str(path) in str(caught.value)


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"(?s)no device is given.*rpi5.*eexform costs --device"):
        load_device("")
    with pytest.raises(OptionError, match="no such device: did you mean 'rpi"):
        load_device("rpi3")
    with pytest.raises(OptionError, match="cannot be read: no such file"):
        load_device(tmp_path / "absent.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(OptionError, match="cannot be read"):
        load_device(tmp_path / "folder.toml")
    for name, content, message in (
        ("a.toml", "name = ", "not valid TOML"),
        ("a.json", "{", "not valid JSON"),
        ("deep.toml", "a = " + "[" * 100_000, "not valid TOML"),
        ("deep.json", "[" * 100_000, "not valid JSON"),
        ("b.json", "{}", "no key 'device'"),
        ("c.json", "[]", "no key 'device'"),
        ("d.json", '{"device": 3}', "a device is a table of keys, found int"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(OptionError, match=message):
            load_device(tmp_path / name)
