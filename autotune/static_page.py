"""The static table as files: CSV, and a Markdown page beside it."""

from pathlib import Path

from hsa_tl.autotune.static import COLUMNS
from hsa_tl.bench.record import csv_text
from hsa_tl.files import write_together

PAGE = """# Static check of the TileLang programs

Every config of every program for the problems tagged ci, lowered for sm_90a, assembled by nvcc and read back: registers
a thread at launch, spills, shared memory, CTAs for each SM, tensor-core instructions. ns/pair is a prediction for an
{device} (`autotune/cost.py`; a pair is one token, key/value head and chunk; for the union tile all its tokens agree),
beside the roofline. Nothing here is a measurement. Written by `hsa-tl static --out` at commit {commit} with
{versions}; all columns: [{name}]({name}).

| case | program | config | registers | spills | smem | CTAs/SM | MMA | ns/pair | limiter | roofline |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def write(rows: list[dict], path: Path) -> None:
    """The rows as CSV, COLUMNS first line, and as a Markdown table in README.md beside it."""
    page = PAGE.format(**rows[0] | {"device": rows[0]["device"].upper(), "name": path.name})
    for r in rows:
        cells = [r["case"], f"`{r['program']}`", r["config"].replace(",", ", ")]
        if r["error"] is None:
            cells += [r[name] for name in ("registers", "spill_bytes", "smem_bytes", "ctas_per_sm")]
            cells += [r["hgmma"] or r["hmma"] or "", f"{r['ns_per_pair']:.3g}", r["limiter"], f"{r['roofline_ns']:.3g}"]
        else:
            cells.append(r["error"])
        page += f"| {' | '.join(map(str, cells))} |\n"
    write_together({path: csv_text(rows, COLUMNS), path.with_name("README.md"): page})
