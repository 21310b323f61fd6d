"""Configs of the decode programs."""

from dataclasses import dataclass
from typing import ClassVar

from hsa_tl.kernels_tilelang.config_auxiliary import AuxiliaryConfig, next_power_of_two
from hsa_tl.kernels_tilelang.config_base import SMEM_ALIGNMENT, first_legal, row_bytes
from hsa_tl.kernels_tilelang.config_forward import FwdTokenConfig


def preferred_splits(p, sms: int = 132) -> int:
    """The least power of two that gives each SM two CTAs, or the most that leaves each CTA a slot."""
    splits = 1
    while 2 * splits <= p.K and splits * p.B * p.T * p.H < 2 * sms:
        splits *= 2
    return splits


def most_splits(p) -> int:
    """The largest power of two of at most K."""
    return 1 << (p.K.bit_length() - 1)


def _splits(p) -> tuple[int, ...]:
    return tuple(dict.fromkeys((preferred_splits(p), 1, min(8, most_splits(p)), most_splits(p))))


@dataclass(frozen=True)
class DecodeSplitConfig(FwdTokenConfig):
    """A CTA owns a num_splits-th of the slots of one token and key/value head; num_stages pages are in flight."""

    num_splits: int = 1
    DIRECTION: ClassVar[str] = "decode"
    KEY: ClassVar[tuple[str, ...]] = ("G", "D", "S", "K", "heads_w", "dtype")

    def ctas(self, p):
        return p.B * p.H * p.T * self.num_splits

    def chunk_reads(self, p):
        return 0.0  # pair_bytes has them, from HBM

    def pair_bytes(self, p):
        out = p.itemsize if self.num_splits == 1 else 4 * self.num_splits
        moved = p.chunk_bytes() + p.G * p.D * (p.itemsize * self.num_splits + out) / p.K
        return {"l2": moved, "hbm": moved}  # no token shares a page with another

    def refusal(self, p):
        if not 1 <= self.num_splits <= p.K:
            return f"num_splits must be 1 to K = {p.K}, got {self.num_splits}"
        return super().refusal(p)

    @classmethod
    def options(cls, p):
        first, *others = _splits(p)
        usual = [cls(*x, first) for x in ((128, 2), (128, 3), (64, 2))] + [cls(128, 2, n) for n in others]
        # A lone warp and an unpipelined loop are for shapes that nothing better fits.
        return first_legal(p, usual, [cls(*x, n) for n in _splits(p) for x in ((128, 1), (64, 1), (32, 2), (32, 1))])

    @classmethod
    def on_cpu(cls, p):
        return cls(num_splits=2 if p.T == 1 < p.K else 1)


@dataclass(frozen=True)
class DecodeCombineConfig(AuxiliaryConfig):
    """A CTA sums the num_splits partial rows of one query head of a token."""

    num_splits: int = 2
    threads: int = 256
    DIRECTION: ClassVar[str] = "combine"
    KEY: ClassVar[tuple[str, ...]] = ("G", "D", "dtype")

    def pair_bytes(self, p):
        moved = (p.G * p.D * 4 * self.num_splits + row_bytes(p)) / p.K
        return {"l2": moved, "hbm": moved}

    def smem_bytes(self, p):
        return 4 * self.threads + SMEM_ALIGNMENT

    def accumulators(self, p):
        return (self.num_splits + 1) * next_power_of_two(p.D)

    def refusal(self, p):
        return None if self.num_splits >= 1 else f"num_splits must be at least 1, got {self.num_splits}"

    @classmethod
    def options(cls, p):
        return [cls(n) for n in _splits(p)]
