# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Run `smoke.py` on every minor release of Transformers that setup.cfg admits, and compare the releases' results.

    python tests/releases/run.py              # all, oldest to newest; one after the other
    python tests/releases/run.py 5.17 5.24    # these

Each release has an environment of its own, `.venv-releases/5.N`: Transformers and what that release asks for in other
versions, over the packages of the environment that runs this. It is made once; delete the folder to make it anew. The
table goes to the terminal, and to `docs/releases.md` when all releases were run.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".venv-releases"
# Sums of some hundred float32 products, relative to the largest logit; measured: 0 on one machine.
TOLERANCE = 1e-5

PAGE = """# Releases of Transformers

What `make test-releases` printed on {date}, Python {python}, torch {torch}: each minor release in an environment of
its own. A cell counts checks for PEER, its rivals and, where it applies, Llama. "Same results" compares logits, greedy
tokens and beams with those of {newest}.

{table}
"""


def minor_releases():
    """Every minor release from the oldest in setup.cfg to the newest in constraints.txt, such as `5.17`."""
    oldest = re.search(r"transformers>=5\.(\d+)", (ROOT / "setup.cfg").read_text())
    newest = re.search(r"^transformers==5\.(\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return [f"5.{minor}" for minor in range(int(oldest[1]), int(newest[1]) + 1)]


def environment_of(release):
    """Make the environment of `release` unless it is there; returns its Python."""
    folder = ENVIRONMENTS / release
    python = folder / "bin" / "python"
    if (folder / "installed").exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    variables = {"base": str(folder), "platbase": str(folder)}
    own = Path(sysconfig.get_path("purelib", "venv", variables))
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # Pinned, or pip would bring another torch.
    kept = [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "numpy", "accelerate", "peft")]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, f"transformers=={release}.*", *kept], check=True)
    (folder / "installed").touch()
    return python


def run(release, python):
    """Run the checks on one release.

    Returns:
        outcomes: `{check: [outcome of each of its cases]}`.
        seconds: how long they took.
    """
    report, results = ENVIRONMENTS / f"{release}.xml", ENVIRONMENTS / f"{release}.safetensors"
    report.unlink(missing_ok=True)
    results.unlink(missing_ok=True)
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "RELEASE": release, "RELEASE_RESULTS": str(results)}
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        str(HERE / "smoke.py"),
    ]
    started = time.monotonic()
    subprocess.run(command, env=variables, cwd=ROOT)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        outcomes.setdefault(case.get("name").partition("[")[0], []).append(outcome)
    return outcomes, time.monotonic() - started


def differences(release, newest):
    """Names of results of `release` that differ from those of `newest`."""
    ours, theirs = (load_file(ENVIRONMENTS / f"{name}.safetensors") for name in (release, newest))
    differing = sorted(ours.keys() ^ theirs.keys())
    for name in sorted(ours.keys() & theirs.keys()):
        one, other = ours[name], theirs[name]
        same_shape = one.shape == other.shape
        if not same_shape or (one - other).abs().max() > (
            TOLERANCE * other.abs().max() if one.is_floating_point() else 0
        ):
            differing.append(name)
    return differing


def table(rows):
    """Markdown: a row a release."""
    checks = list(dict.fromkeys(check for _, outcomes, _, _ in rows for check in outcomes))
    checks.remove("test_this_is_the_release_that_was_asked_for")
    titles = [check.removeprefix("test_").replace("_", " ") for check in checks]
    lines = [
        f"| release | {' | '.join(titles)} | same results | seconds |",
        f"|---|{'---|' * len(checks)}---|---|",
    ]
    for release, outcomes, differing, seconds in rows:
        cells = [_cell(outcomes.get(check, [])) for check in checks]
        lines.append(f"| {release} | {' | '.join(cells)} | {', '.join(differing) or 'yes'} | {seconds:.0f} |")
    return "\n".join(lines)


def _cell(outcomes):
    counts = {kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped")}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "not run"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = minor_releases()
    parser.add_argument("releases", nargs="*", choices=[[], *known], help="default: all that setup.cfg admits")
    releases = parser.parse_args().releases or known
    rows = []
    # The newest first: the others are compared with it.
    for release in sorted({*releases, known[-1]}, key=known.index, reverse=True):
        print(f"== transformers {release}", flush=True)
        python = environment_of(release)
        command = [str(python), "-c", "import transformers; print(transformers.__version__)"]
        version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        outcomes, seconds = run(release, python)
        rows.insert(0, (version, outcomes, differences(release, known[-1]), seconds))
    printed = table(rows)
    print(printed)
    if len(rows) == len(known):
        facts = {"date": time.strftime("%Y-%m-%d"), "python": sys.version.split()[0], "torch": torch.__version__}
        (ROOT / "docs" / "releases.md").write_text(PAGE.format(table=printed, newest=rows[-1][0], **facts))
    failed = any("failed" in cases for _, outcomes, _, _ in rows for cases in outcomes.values())
    return int(failed or any(differing for _, _, differing, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
