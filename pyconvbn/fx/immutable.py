# SPDX-License-Identifier: BSD-3-Clause
"""What the args of a node are made of: lists and dicts that refuse to be changed in place.

The graph keeps lists of users exact, which it can only do when every change of an argument passes through the node.
"""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["immutable_dict", "immutable_list"]


def _refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise TypeError(
        f"{type(self).__name__}: arguments of a node cannot be changed in place; assign new ones, "
        "as in node.args = (...) or node.update_arg(0, ...)"
    )


class immutable_list(list):  # type: ignore[type-arg]
    """A list that cannot be changed. Hashable when its items are.

    >>> from pyconvbn.fx.immutable import immutable_list
    >>> items = immutable_list([1, 2])
    >>> items[0], items == [1, 2]
    (1, True)
    >>> items.append(3)
    Traceback (most recent call last):
    ...
    TypeError: immutable_list: arguments of a node cannot be changed in place; assign new ones, as in \
node.args = (...) or node.update_arg(0, ...)
    """

    __slots__ = ()

    append = extend = insert = remove = pop = clear = sort = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return immutable_list, (list(self),)

    def __copy__(self) -> immutable_list:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> immutable_list:
        from copy import deepcopy

        return immutable_list([deepcopy(item, memo) for item in self])


class immutable_dict(dict):  # type: ignore[type-arg]
    """A dict that cannot be changed. Hashable when its values are.

    >>> from pyconvbn.fx.immutable import immutable_dict
    >>> immutable_dict(a=1)["a"]
    1
    """

    __slots__ = ()

    clear = pop = popitem = setdefault = update = _refuse
    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return immutable_dict, (dict(self),)

    def __copy__(self) -> immutable_dict:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> immutable_dict:
        from copy import deepcopy

        return immutable_dict({key: deepcopy(value, memo) for key, value in self.items()})
