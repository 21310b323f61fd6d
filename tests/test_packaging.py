"""What is installed: the declared packages are the folders, the wheel holds only hsa_tl, the import is light."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiers import prove

tomllib = pytest.importorskip("tomllib", reason="pyproject.toml is read with Python 3.11's tomllib")

ROOT = Path(__file__).parent.parent
FOLDERS = ("hsa_tl", "kernels_tilelang", "autotune", "model", "bench")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def python(code: str, cwd: Path, path: Path | None = None) -> str:
    """What a fresh interpreter prints."""
    env = {"PATH": "/usr/bin:/bin", "HOME": str(cwd)} | ({"PYTHONPATH": str(path)} if path else {})
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def folders_with_modules() -> dict[str, str]:
    """Package name -> folder, for every folder of the tree that holds Python files."""
    folders = {f.parent.relative_to(ROOT) for top in FOLDERS for f in (ROOT / top).rglob("*.py")}
    return {".".join((() if f.parts[0] == "hsa_tl" else ("hsa_tl",)) + f.parts): f.as_posix() for f in folders}


def test_declared_packages_are_the_folders():
    on_disk = folders_with_modules()
    assert sorted(SETUPTOOLS["packages"]) == sorted(on_disk)
    mapped = SETUPTOOLS["package-dir"]
    for package, folder in on_disk.items():
        # The nearest mapped ancestor decides, as in setuptools.
        ancestor = next(p for p in (package.rsplit(".", n)[0] for n in range(3)) if p in mapped)
        assert mapped[ancestor] + package.removeprefix(ancestor).replace(".", "/") == folder
        assert (ROOT / folder / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, unpacked. Built from a copy: a build writes into its source tree."""
    source, out, site = (tmp_path_factory.mktemp(x) for x in ("source", "out", "site"))
    for x in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        ignore = shutil.ignore_patterns("__pycache__", "results")
        (shutil.copytree(ROOT / x, source / x, ignore=ignore) if (ROOT / x).is_dir() else shutil.copy(ROOT / x, source))
    name = python(f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))", source)
    zipfile.ZipFile(out / name.splitlines()[-1]).extractall(site)
    return site


def test_wheel_holds_hsa_tl_only(wheel):
    assert sorted(p.name.split("-")[0] for p in wheel.iterdir()) == ["hsa_tl", "hsa_tl"]
    sources = {f.relative_to(ROOT).as_posix() for top in FOLDERS for f in (ROOT / top).rglob("*.py")}
    packed = {f.relative_to(wheel).as_posix() for f in wheel.rglob("*.py")}
    assert packed == {f if f.startswith("hsa_tl/") else f"hsa_tl/{f}" for f in sources}
    for folder in ("autotune/tables", "autotune/devices"):
        data = {f.name for f in (ROOT / folder).glob("*.json")}
        assert {f.name for f in wheel.glob(f"hsa_tl/{folder}/*.json")} == data
    for folder in ("model/recipes", "model/weights"):
        packed = {f.name: f.read_bytes() for f in (wheel / "hsa_tl" / folder).iterdir()}
        assert packed == {f.name: f.read_bytes() for f in (ROOT / folder).iterdir()}
    metadata = next(wheel.glob("hsa_tl-*.dist-info"))
    assert "hsa-tl = hsa_tl.cli:app" in (metadata / "entry_points.txt").read_text()
    assert list(metadata.rglob("LICENSE"))
    assert (wheel / "hsa_tl" / "py.typed").exists()


def test_wheel_imports(wheel):
    code = f"""if True:
        import torch, hsa_tl, hsa_tl.kernels_tilelang.config, hsa_tl.autotune.table, hsa_tl.model, hsa_tl.bench
        assert all(m.__file__.startswith({str(wheel)!r}) for m in (hsa_tl, hsa_tl.kernels_tilelang, hsa_tl.model))
        q = torch.randn(1, 40, 2, 16)
        _, indices = hsa_tl.retrieve_chunks(q, torch.randn(1, 3, 2, 16), 2, chunk_size=16)
        print(hsa_tl.hsa_attention(q, q, q, torch.ones(1, 40, 2, 2), indices, chunk_size=16).shape)
    """
    assert python(code, wheel, wheel) == "torch.Size([1, 40, 2, 16])"


def test_wheel_loads_its_weights(wheel):
    code = "from hsa_tl.model import load; m = load('needle-tiny'); print(m.tokenizer.name, m.num_parameters())"
    assert python(code, wheel, wheel) == "needles 602434"


def test_imports_are_light(tmp_path):
    """Neither tilelang nor triton beyond what torch itself loads, and no CUDA context."""
    code = """if True:
        import importlib, sys
        for module in ("torch", "hsa_tl", "hsa_tl.autotune.table", "hsa_tl.model"):
            importlib.import_module(module)
            print(sorted({m.split(".")[0] for m in sys.modules} & {"tilelang", "triton", "tvm", "typer", "rich"}))
        assert not sys.modules["torch"].cuda.is_initialized()
    """
    lines = python(code, tmp_path).splitlines()
    assert len(lines) == 4 and lines == lines[:1] * 4


@prove
def test_mypy_sees_the_types(wheel, tmp_path):
    """The wheel is typed (PEP 561): a user's script is checked, right and wrong."""
    pytest.importorskip("mypy", reason="needs mypy")
    script = tmp_path / "script.py"
    script.write_text("""if True:
        import torch
        from hsa_tl import fusion_weights, hsa_attention, retrieve_chunks
        from hsa_tl.model import Model, preset
        x = torch.randn(1, 32, 1, 16)
        scores, indices = retrieve_chunks(x, torch.randn(1, 2, 1, 16), 2, chunk_size=16)
        weights = fusion_weights(scores)
        assert isinstance(weights, torch.Tensor)
        out: torch.Tensor = hsa_attention(x, x, x, weights, indices, chunk_size=16)
        logits: torch.Tensor | None = Model(preset("tiny"))(torch.zeros(1, 4, dtype=torch.int64)).logits
        wrong: int = retrieve_chunks(x, x, topk="2")
    """)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path), str(script)]
    env = {"PATH": "/usr/bin:/bin", "MYPYPATH": str(wheel)}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    found = [line.split("error: ")[1] for line in result.stdout.splitlines() if "error: " in line]
    assert len(found) == 2 and all("script.py:11" in x for x in result.stdout.splitlines()[:2]), result.stdout
    assert any("tuple[Tensor, Tensor]" in x for x in found) and any('"topk"' in x for x in found), found
