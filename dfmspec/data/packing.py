"""Which samples share a packed sequence; the trainer's task encoder and the rule that looks for padding ask here."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Packs of at most `length` tokens: the indices of their samples, whose tokens are `sizes`.

    Longest first, each into the first pack that has room; ties in the order of arrival, so a resumed run packs as one
    that never stopped. A sample longer than `length` has a pack of its own.
    """
    packs: list[list[int]] = []
    smallest = min(sizes, default=0)
    longest_first = sorted(range(len(sizes)), key=lambda index: sizes[index], reverse=True)

    # (tokens that are free, pack) of the packs that may take another, in their order.
    with_room: list[tuple[int, int]] = []
    for index in longest_first:
        size = sizes[index]
        at = next((at for at, (free, _) in enumerate(with_room) if size <= free), None)
        if at is None:
            at = len(with_room)
            free = length
            pack = len(packs)
            packs.append([])
        else:
            free, pack = with_room.pop(at)
        packs[pack].append(index)

        # A pack that not even the shortest sample fits in is looked at no more.
        left = free - size
        if left >= smallest:
            with_room.insert(at, (left, pack))
    return packs
