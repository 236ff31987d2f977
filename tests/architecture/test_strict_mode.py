"""`tests/conftest.py` in runs of its own: with USAGI_STRICT=1 every kind of skip fails, without it none does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
SKIPS = {
    "call": "import pytest\ndef test_it():\n    pytest.skip('why')\n",
    "mark": "import pytest\n@pytest.mark.skip(reason='why')\ndef test_it():\n    pass\n",
    "fixture": ("import pytest\n@pytest.fixture\ndef it():\n    pytest.skip('why')\n\ndef test_it(it):\n    pass\n"),
    "module": "import pytest\npytest.skip('why', allow_module_level=True)\n",
    "import": "import pytest\npytest.importorskip('no_such_module_why')\ndef test_it():\n    pass\n",
}


def run_pytest(folder, source, strict):
    shutil.copy(CONFTEST, folder / "conftest.py")
    (folder / "test_sample.py").write_text(source)
    environment = {**os.environ, "USAGI_STRICT": "1" if strict else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", SKIPS)
def test_a_skip_fails_in_strict_mode(tmp_path, kind):
    result = run_pytest(tmp_path, SKIPS[kind], strict=True)
    assert result.returncode in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED), result.stdout
    assert "a skip is a failure" in result.stdout
    assert "why" in result.stdout


@pytest.mark.parametrize("kind", SKIPS)
def test_a_skip_is_a_skip_otherwise(tmp_path, kind):
    result = run_pytest(tmp_path, SKIPS[kind], strict=False)
    assert result.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), result.stdout
    assert "1 skipped" in result.stdout


def test_expected_failures_are_no_skips(tmp_path):
    source = "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_it():\n    assert False\n"
    assert run_pytest(tmp_path, source, strict=True).returncode == pytest.ExitCode.OK


def test_the_containers_tests_come_last(tmp_path):
    source = "import pytest\n@pytest.mark.docker\ndef test_container():\n    pass\n\ndef test_plain():\n    pass\n"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    docker: containers\naddopts = -vv\n")
    output = run_pytest(tmp_path, source, strict=False).stdout
    assert output.index("test_plain") < output.index("test_container"), output
