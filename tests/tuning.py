"""A compiler and a GPU for the tests of the tuner: no time passes but what they say."""

from concurrent.futures import ThreadPoolExecutor

from hsa_tl.autotune import measure, static

RATES = ("issue", "wgmma_flops", "mma_flops", "special", "smem_bytes", "issue_warp", "barriers", "waits", "loads")


def fake_compiler(program, problem, config):
    """As static.analyse of one: every third config fails or spills, work by the config's fields."""
    seed = sum((i + 3) * value for i, value in enumerate(vars(config).values())) % 11
    found = dict.fromkeys(static.READ) | {"spill_bytes": 16 * (seed == 5), "ctas_per_sm": 1 + seed % 2, "copies": 9}
    if seed == 7:
        return found | {"error": "RuntimeError: nvcc refused the program"}
    work = {name: 2.0 * (i + 1 + seed) for i, name in enumerate(RATES)} | {"wgmma_flops": 4e5, "mma_flops": 0.0}
    work |= {"pairs": 1 + seed % 3, "loads": 0, "stages": 2}
    return found | {"registers": 128, "smem_bytes": 90000, "hgmma": 12, "hmma": 12, "work": work}


def compile_by(monkeypatch, compiler):
    """The static check's processes are a thread, which asks the compiler of each config."""

    class Pool(ThreadPoolExecutor):
        def submit(self, analyse, program, problem, options):
            return super().submit(lambda: [compiler(program, problem, config) for config in options])

    monkeypatch.setattr(static, "ProcessPoolExecutor", lambda *_, **__: Pool(1))


class FakeGpu:
    """A rig whose time passes only where it works: 1 s for a check, 1 s for a preparation, 0.1 s for a round.

    wrong, refused, slow and dies name configs of a plan's first program.
    """

    def __init__(self, wrong=(), refused=(), slow=None, dies=()):
        self.now, self.log, self.wrong, self.refused, self.slow, self.dies = 0.0, [], wrong, refused, slow or {}, dies

    def check(self, direction, problem, programs):
        config = programs[0][1]
        self.now += 1
        self.log.append(("check", config))
        if config in self.dies:
            raise SystemExit
        if config in self.wrong:
            raise AssertionError("out: max error 1 above 0.1\nand more")

    def prepare(self, direction, problem, programs, selection):
        config = programs[0][1]
        self.now += 1
        if config in self.refused:
            raise RuntimeError("nvcc refused the program")
        return config, selection

    def time_us(self, run):
        self.now += 0.1
        self.log.append(("time", *run))
        config, selection = run
        wobble = 1 + 0.01 * (len(self.log) % 3)
        return self.slow.get(config, 100.0) * {"0.2": 2.0, "0.7": 1.0, "0.9": 0.5}[selection] * wobble

    def rig(self):
        return measure.Rig(self.check, self.prepare, self.time_us, lambda: self.now)

    def checked(self):
        return [x[1] for x in self.log if x[0] == "check"]
