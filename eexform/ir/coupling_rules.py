"""Every file of coupling rules; importing this one registers them (see :mod:`eexform.ir.coupling`)."""

from eexform.ir import (  # noqa: F401
    coupling_attention,
    coupling_conv,
    coupling_elementwise,
    coupling_norm,
    coupling_pool,
    coupling_product,
    coupling_reshape,
    coupling_rnn,
    coupling_shape,
    coupling_slice,
)
