"""Token files of texts that a test names, where `hsa-tl prepare` would split them."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hsa_tl.model.data import ByteTokenizer, Sidecar, TokenFile, sidecar_path


def write_tokens(path: Path, texts: list[str | bytes]) -> TokenFile:
    """Of bytes; each text is a document."""
    bytes_ = ByteTokenizer()
    tokens = np.concatenate([np.append(x, bytes_.end) for x in bytes_.encode_all(texts)]).astype("<u2")
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tokens.tobytes())
    sidecar = Sidecar(len(tokens), len(texts), "uint16", bytes_.vocab_size, bytes_.name, bytes_.end, digest)
    sidecar_path(path).write_text(json.dumps(asdict(sidecar)))
    return TokenFile(path)
