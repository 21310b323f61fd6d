"""What every program's config is made of: the base class, and the limits of an SM that its arithmetic uses."""

from typing import ClassVar

from hsa_tl.problem import Problem

SMEM_LIMIT = 227 * 1024  # bytes a CTA may ask for on sm_90
SMEM_SM = 228 * 1024  # bytes of an SM, SMEM_RESERVED of them for each CTA
SMEM_RESERVED = 1024 + 128  # 128: static shared memory (barriers), rounded up
SMEM_ALIGNMENT = 2048  # what aligning swizzled tiles to 1 KB may add
MAX_REGISTERS = 255  # a thread
WORKING_REGISTERS = 52  # beside the accumulators: addresses, row statistics, operands; less made ptxas spill
WARPGROUP = 128  # threads


class Config:
    """A program's config: its fields, and what its tile takes. One frozen subclass for each program."""

    DIRECTION: ClassVar[str]  # what it computes: a key of hsa_tl.problem.GEMMS
    KEY: ClassVar[tuple[str, ...]] = ("G", "D", "S", "K", "heads_w", "masked", "dtype")  # of static_key: its builder's
    specialised: ClassVar[bool] = False  # on a GPU run sm90a/<program>.py, its hand-specialised twin
    threads: int  # that compute

    def total_threads(self) -> int:
        """Threads of a CTA, with those that only copy."""
        return self.threads

    def rows(self, p: Problem) -> int:
        """Rows of the tile that the tensor cores multiply."""
        raise NotImplementedError

    def pairs(self, p: Problem) -> int:
        """(token, chunk) pairs that one pass of the tile serves, at best."""
        return 1

    def pair_bytes(self, p: Problem) -> dict[str, float]:
        """Bytes that one pair moves, by level: l2, hbm, reduce (float32 reduce-add); keys and values stay in L2."""
        raise NotImplementedError

    def smem_bytes(self, p: Problem) -> int:
        """At most so much shared memory does a CTA take."""
        raise NotImplementedError

    def accumulators(self, p: Problem) -> int:
        """float32 elements of the CTA's fragments."""
        raise NotImplementedError

    def refusal(self, p: Problem) -> str | None:
        """Why the program cannot run this problem, beside threads, shared memory and registers, or None."""
        raise NotImplementedError

    @classmethod
    def options(cls, p: Problem) -> list:
        """The search space in order of preference, legal or not."""
        raise NotImplementedError

    @classmethod
    def on_cpu(cls, p: Problem) -> "Config":
        """The config for the CPU target, where only the tile's size matters."""
        return cls()

    def tensor_core(self) -> str | None:
        """The instruction that the program claims (wgmma takes 64 rows and a whole warpgroup), or None."""
        return "hgmma"


def row_bytes(p: Problem) -> int:
    """One token's q, do, dq or out for one key/value head."""
    return p.G * p.D * p.itemsize
