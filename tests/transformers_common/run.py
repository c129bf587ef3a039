"""Run the common model tests of the installed Transformers version on EViT.

    pip install parameterized && python tests/transformers_common/run.py

The tests are not part of the installed package: they are taken from its source distribution on the package index, for
exactly the installed version.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


# The common tests import helpers that the source distribution leaves out and that image models never call.
MISSING_HELPERS = {
    "__init__.py": "",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
}


def main() -> int:
    """Download, unpack, run; return pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        requirement = f"transformers=={transformers.__version__}"
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", "-d", folder]
        subprocess.run([*download, requirement], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            members = [member for member in tar.getmembers() if "/tests/" in member.name]
            tar.extractall(folder, members, filter="data")
        tests = Path(folder) / archive.name.removesuffix(".tar.gz") / "tests"
        shutil.copy(Path(__file__).with_name("evit_common_tests.py"), tests / "test_evit.py")
        for name, text in MISSING_HELPERS.items():
            (tests / name).parent.mkdir(exist_ok=True)
            (tests / name).write_text(text)
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/test_evit.py"], cwd=tests.parent
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
