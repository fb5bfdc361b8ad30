"""Triton's interpreter runs the kernels of this folder on CPU tensors; it is chosen when a kernel is decorated.

So these tests need a process of their own with TRITON_INTERPRET=1, which `tests/kernels/test_interpreter.py` starts; in
the ordinary process nothing here is collected. fp32 only: the interpreter's bf16 products are wrong (triton#11584).
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor_for_numpy_2_4(tensor, scope) -> None:
        """A scalar is an array of one element there, which numpy 2.4 no longer turns into an index (triton#9171)."""
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor_for_numpy_2_4
else:
    collect_ignore_glob = ["test_*.py"]
