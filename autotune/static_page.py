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
    write_together({path: csv_text(rows, COLUMNS), path.with_name("README.md"): _page(rows, path.name)})


def _page(rows: list[dict], name: str) -> str:
    lines = [
        f"| {r['case']} | `{r['program']}` | {r['config'].replace(',', ', ')} | {r['registers']} | {r['spill_bytes']} "
        f"| {r['smem_bytes']} | {r['ctas_per_sm']} | {r['hgmma'] or r['hmma'] or ''} | {r['ns_per_pair']:.3g} "
        f"| {r['limiter']} | {r['roofline_ns']:.3g} |"
        if r["error"] is None
        else f"| {r['case']} | `{r['program']}` | {r['config'].replace(',', ', ')} | {r['error']} |"
        for r in rows
    ]
    head = PAGE.format(**rows[0] | {"device": rows[0]["device"].upper(), "name": name})
    return head + "\n".join(lines) + "\n"
