"""Which samples share a packed sequence; the trainer's task encoder and the rule that looks for padding ask here."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Packs of at most `length` tokens: the indices of their samples, whose tokens are `sizes`.

    Longest first, each into the first pack that has room; ties in the order of arrival, so a resumed run packs as one
    that never stopped. A sample longer than `length` has a pack of its own.
    """
    packs: list[list[int]] = []
    with_room: list[tuple[int, int]] = []
    """(tokens that are free, pack) of the packs that may take another, in their order."""
    smallest = min(sizes, default=0)
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True):
        at = next((at for at, (free, _) in enumerate(with_room) if sizes[index] <= free), None)
        if at is None:
            at, free, pack = len(with_room), length, len(packs)
            packs.append([])
        else:
            free, pack = with_room.pop(at)
        packs[pack].append(index)
        if free - sizes[index] >= smallest:
            with_room.insert(at, (free - sizes[index], pack))
    return packs
