"""Every file of rules that comes with eexform; importing one registers its rules (see :mod:`eexform.backends.fx`)."""

from eexform.backends import (  # noqa: F401
    fx_activation,
    fx_attention,
    fx_cast,
    fx_control,
    fx_conv,
    fx_grid,
    fx_index,
    fx_linear_attention,
    fx_loss,
    fx_nn,
    fx_norm,
    fx_ops,
    fx_pool,
    fx_quant,
    fx_reduce,
    fx_resize,
    fx_rnn,
    fx_sequence,
    fx_shapes,
    fx_signal,
)
