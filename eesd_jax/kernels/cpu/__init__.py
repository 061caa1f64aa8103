"""Kernels for CPUs, most of them written in LLVM. Imported (`eesd_jax.load_kernels`), they register themselves in `model/ops.py`."""

from eesd_jax.kernels.cpu import attention, cache, forms, integers, products
from eesd_jax.model import cache as kv
from eesd_jax.model import ops

CPU = "cpu"

ops.cached_attention.register(CPU, attention.accepts, attention.cached_attention)
ops.linears.register(CPU, products.can_read_codes, products.by_codes)
ops.linears.register(CPU, products.can_read_matrices, products.by_matrices)
ops.linears.register(CPU, products.is_one_row, products.one_row)
ops.pack_codes.register(CPU, forms.always, integers.from_codes)
ops.rotation.register(CPU, forms.always, forms.rotation)
ops.argmax.register(CPU, forms.divides_into_groups, forms.argmax)
kv.hold.register(CPU, cache.can_hold, cache.hold)
kv.write_at.register(CPU, cache.can_write, cache.write_at)
