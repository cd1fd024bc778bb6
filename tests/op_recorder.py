"""Which ops run, and which of them a GPU would wait for."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Names of all ops that run below it; what a GPU would wait for inside of an indexing op is named too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.append(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            booleans = any(index is not None and index.dtype == torch.bool for index in args[1])
            number = name != "index" and args[2].dim() == 0
            # a number below a boolean mask is a masked_fill; through index tensors it is copied from the host
            if booleans != number:
                self.names.append("nonzero" if booleans else "copy_from_host")
        return func(*args, **(kwargs or {}))

    def waits(self):
        waits = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_assert_async", "repeat_interleave"}
        return (waits | {"copy_from_host"}) & set(self.names)
