"""Takes out of Triton's interpreter what costs time and finds nothing.

It replaces parts of Triton, as they are from 3.6 to 3.9: not where kernels are compiled.
"""

from __future__ import annotations

import dataclasses

from triton import language
from triton.language import core, semantic
from triton.runtime import interpreter


def hasten() -> None:
    _do_not_compute_twice()
    _replace_once()
    _know_types()


def _do_not_compute_twice() -> None:
    """Each integer sum came once more in 64 bits, to see whether it overflowed: what matters of that is seen in the
    results."""
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


def _replace_once() -> None:
    """The language is replaced by one that computes where a kernel begins: not at each call of a function, too. With
    that, and the sums in 64 bits, the longest test took 190 s: without, 73."""
    replace, replaced = interpreter._patch_lang, set()

    def replace_once(function):
        if function.__module__ in replaced:
            return None
        replaced.add(function.__module__)
        scope = replace(function)
        restore = scope.restore

        def restore_all() -> None:
            replaced.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = replace_once


def _know_types() -> None:
    """What follows from types alone is worked out once for each type, not for each tensor: rMLE's exact minima took
    54 s without, and take 38."""
    block_type, tensor, Semantic = language.block_type, language.tensor, semantic.TritonSemantic
    make_type, make_tensor, stored_as = block_type.__init__, tensor.__init__, interpreter._get_np_dtype
    check, broadcast = Semantic.binary_op_type_checking_impl, Semantic.broadcast_impl_value
    types, stored = {}, {}

    def make_type_once(self, element_ty, shape) -> None:
        key = element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = self.__dict__ | {"with_element": {}}
        self.__dict__ = types[key]

    def with_element_once(self, scalar_ty):
        if scalar_ty.name not in self.with_element:
            self.with_element[scalar_ty.name] = block_type(scalar_ty, self.shape)
        return self.with_element[scalar_ty.name]

    def make_tensor_once(self, handle, type) -> None:
        if "of_tensors" not in type.__dict__:
            make_tensor(self, handle, type)
            type.of_tensors = {name: value for name, value in self.__dict__.items() if name not in ("handle", "type")}
        self.__dict__.update(type.of_tensors, handle=handle, type=type)

    def stored_as_once(dtype):
        if dtype.name not in stored:
            stored[dtype.name] = stored_as(dtype)
        return stored[dtype.name]

    def check_where_needed(self, left, right, allow_left=False, allow_right=False, arithmetic=True, divides=False):
        alike = type(left) is tensor and type(right) is tensor and left.type.__dict__ is right.type.__dict__
        if alike and not divides and not left.dtype.is_ptr():
            return left, right
        return check(self, left, right, allow_left, allow_right, arithmetic, divides)

    def broadcast_where_needed(self, left, right):
        alike = left.type.is_block() and right.type.is_block() and left.type.shape.values == right.type.shape.values
        return (left, right) if alike else broadcast(self, left, right)

    block_type.__init__, block_type.with_element_ty = make_type_once, with_element_once
    tensor.__init__, interpreter._get_np_dtype = make_tensor_once, stored_as_once
    Semantic.binary_op_type_checking_impl, Semantic.broadcast_impl_value = check_where_needed, broadcast_where_needed
