# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Run Transformers' own common test-suite on PEER and on Llama, and fail where PEER is the poorer of the two.

    python tests/upstream/run.py                # both models, two processes
    python tests/upstream/run.py -k rope        # further arguments go to pytest
    python tests/upstream/run.py --sdist DIR    # take the source archive from a folder instead of the package index

The tests come from the source archive of the installed Transformers version, fetched with pip and unpacked under
`build/upstream/`; nothing of it is committed. The archive lacks a few modules that its tests import: the files beside
this one stand in for them, in our own words. `model_tests.py` plugs everything into the models.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from compare import Outcomes, shortfalls, table

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "upstream"

# our file -> the module, inside the package `tests`, that upstream's files import or that pytest collects
LAYOUT = {
    "generation_tests.py": "generation/test_utils.py",
    "export_tests.py": "exporters/test_export.py",
    "config_values.py": "utils/test_configuration_utils.py",
    "process_groups.py": "distributed_testing_utils.py",
    "batch_statistics.py": "batch_statistics.py",
    "pipeline_tests.py": "pipelines/test_text_pipelines.py",
    "model_testers.py": "model_testers.py",
    "model_tests.py": "test_models.py",
}


def fetch_sdist(version, folder):
    """Return the path of `transformers-{version}.tar.gz` in `folder`; pip downloads it if it is not there yet."""
    archive = folder / f"transformers-{version}.tar.gz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"Fetching the source archive of transformers {version} into {folder}", flush=True)
        # pip, not a URL: it knows the reader's index, mirror and proxy
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers"]
        done = subprocess.run([*command, "--dest", str(folder), f"transformers=={version}"])
        if done.returncode or not archive.exists():
            raise SystemExit(
                f"Could not fetch the source archive of transformers {version}: pip's message is above. Without a "
                f"package index, put transformers-{version}.tar.gz into a folder and pass --sdist FOLDER."
            )
    return archive


def lay_out(archive, root):
    """Unpack upstream's tests into `root/tests` and put our files among them; returns the package's path."""
    tests = root / "tests"
    shutil.rmtree(root, ignore_errors=True)
    tests.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            folder, _, name = member.name.partition("/tests/")
            if folder == archive.name.removesuffix(".tar.gz") and name.endswith(".py") and member.isfile():
                target = tests / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    for source, name in LAYOUT.items():
        (tests / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / source, tests / name)
    # one module for each pipeline; those that are not for text keep an empty name
    mixin = (tests / "test_pipeline_mixin.py").read_text()
    for module, name in set(re.findall(r"pipelines\.(test_pipelines_\w+)(?:\.| import )(\w+)", mixin)):
        source = f"from . import test_text_pipelines\n\n{name} = getattr(test_text_pipelines, {name!r}, None)\n"
        (tests / "pipelines" / f"{module}.py").write_text(source)
    for package in [tests, *(path for path in tests.rglob("*") if path.is_dir())]:
        (package / "__init__.py").touch()
    # upstream imports `src/transformers/__init__.py` to get at the library; empty, it yields the installed one
    (root / "src" / "transformers").mkdir(parents=True)
    (root / "src" / "transformers" / "__init__.py").touch()
    (root / "pytest.ini").write_text(
        "[pytest]\naddopts = -p no:cacheprovider --disable-warnings\nverbosity_subtests = 0\n"
        # one test looks for the deprecation of the cache's old name
        "filterwarnings =\n    ignore\n    default:`past_key_values` is deprecated:FutureWarning\n"
    )
    return tests


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, default=BUILD / "sdist", help="folder that holds the source archive")
    parser.add_argument("-n", "--processes", default="2", help="pytest-xdist workers; 0 runs in this process")
    arguments, pytest_arguments = parser.parse_known_args()

    version = importlib.metadata.version("transformers")
    root = BUILD / f"transformers-{version}"
    tests = lay_out(fetch_sdist(version, arguments.sdist.resolve()), root)

    # read when transformers and upstream's tests are imported, here and in every worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: the cores serve more tests, not bigger matmuls
    os.environ.update(
        HF_HUB_OFFLINE="1",
        PYTHONPATH=os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        TRANSFORMERS_TINY_MODEL_PATH=str(root / "tiny_models"),
    )
    sys.path.insert(0, str(root))
    # upstream starts some tests again in a process of their own, under a path relative to the working directory
    os.chdir(root)
    subprocess.run([sys.executable, "-m", "tests.model_testers", str(root / "tiny_models")], check=True)

    outcomes = Outcomes()
    options = ["-q", "-n", arguments.processes, "--tb=short", "--no-header", *pytest_arguments]
    code = pytest.main([*options, str(tests / "test_models.py")], plugins=[outcomes])
    failed = any(outcome == "failed" for outcome, _ in outcomes.worst.values())
    if code != (pytest.ExitCode.TESTS_FAILED if failed else pytest.ExitCode.OK):
        raise SystemExit(f"pytest did not get through the tests: {code!r}, see above.")

    print(table(outcomes))
    for model, results in outcomes.by_model().items():
        counts = Counter(outcome for outcome, _ in results.values())
        print(f"{model}: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    lines = shortfalls(outcomes)
    for line in lines:
        print(f"SHORTFALL {line}")
    print(f"transformers {version}: {len(lines)} shortfalls of PEER against Llama")
    raise SystemExit(1 if lines else 0)


if __name__ == "__main__":
    main()
