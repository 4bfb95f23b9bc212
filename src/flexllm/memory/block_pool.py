"""Pages of the K/V cache as numbers: which are free, which are held and how often. No tensors here."""

from __future__ import annotations

from collections.abc import Iterable

_HELD, _FREE, _EARMARKED = 0, 1, 2  # an earmarked page is free, but kept for the neighbour it continues while others last


class NoFreeBlocks(Exception):
    """More pages were asked for than are free. Nothing was allocated."""


class BlockPool:
    """A fixed set of pages ("blocks") of `block_size` token positions each, counted by references.

    Blocks are handed out lowest ids first and, where possible, as one run of consecutive ids: attention reads a run
    as a plain slice. A caller that says how far it may grow (`room`) has the ids after its run earmarked: they go to
    others only when nothing else is left.

    Invariant: a block is free (earmarked or not) exactly when its reference count is 0.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a block pool needs at least one block of one token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_free = num_blocks
        self._state = bytearray([_FREE]) * num_blocks  # bytes.find makes the search for a run cheap
        self._refs = [0] * num_blocks

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def capacity(self) -> int:
        """Token positions of the whole pool."""
        return self.num_blocks * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` positions."""
        return -(-tokens // self.block_size)

    def allocate(self, n: int, after: int | None = None, room: int = 0) -> list[int]:
        """Take `n` free blocks with one reference each.

        `after`: the last block of the run to continue, if any; `room`: blocks in all (these included) that the run may
        come to need. Both only steer which ids are chosen. Raises NoFreeBlocks, and takes nothing, if fewer are free.
        """
        if n > self.num_free:
            raise NoFreeBlocks(f"{n} blocks asked for, {self.num_free} of {self.num_blocks} free")
        blocks = self._continue_run(n, after) if after is not None else []
        if len(blocks) < n:
            blocks += self._new_run(n - len(blocks), room)
        for block in blocks:
            self._refs[block] = 1
        self.num_free -= n
        return blocks

    def extend(self, runs: Iterable[list[int]]) -> None:
        """Add one block to each run, in place. What `allocate(1, after=blocks[-1])` does, in a fifth of the time: an iteration does it for
        one running request in `block_size`. Raises NoFreeBlocks; the runs before the one that found none are then longer."""
        state, refs, end = self._state, self._refs, self.num_blocks
        for blocks in runs:
            block = blocks[-1] + 1
            if block < end and state[block] != _HELD:
                state[block] = _HELD
                refs[block] = 1
                self.num_free -= 1
                blocks.append(block)
            else:
                blocks += self.allocate(1)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block; all must be held."""
        for block in blocks:
            assert self._refs[block] > 0, f"block {block} is free and cannot be shared"
            self._refs[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Drop a reference to each block; those without any left are free again."""
        for block in blocks:
            assert self._refs[block] > 0, f"block {block} freed twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._state[block] = _FREE
                self.num_free += 1
                self._clear_earmarks(block + 1)

    def check_integrity(self) -> None:
        assert all(refs >= 0 for refs in self._refs)
        assert all((state == _HELD) == (refs > 0) for state, refs in zip(self._state, self._refs, strict=True))
        assert self.num_free == self._refs.count(0)

    def _continue_run(self, n: int, after: int) -> list[int]:
        end = after + 1
        while end - after - 1 < n and end < self.num_blocks and self._state[end] != _HELD:
            self._state[end] = _HELD
            end += 1
        return list(range(after + 1, end))

    def _new_run(self, n: int, room: int) -> list[int]:
        start = self._state.find(bytes([_FREE]) * max(n, room))
        if start >= 0:
            self._state[start + n : start + max(n, room)] = bytes([_EARMARKED]) * (max(n, room) - n)
        else:
            start = self._state.find(bytes([_FREE]) * n)
        if start >= 0:
            self._state[start : start + n] = bytes([_HELD]) * n
            return list(range(start, start + n))
        return self._scattered(n)

    def _scattered(self, n: int) -> list[int]:
        blocks: list[int] = []
        for kind in (_FREE, _EARMARKED):
            block = self._state.find(kind)
            while block >= 0 and len(blocks) < n:
                self._state[block] = _HELD
                blocks.append(block)
                block = self._state.find(kind, block)
        return blocks

    def _clear_earmarks(self, block: int) -> None:
        while block < self.num_blocks and self._state[block] == _EARMARKED:
            self._state[block] = _FREE
            block += 1
