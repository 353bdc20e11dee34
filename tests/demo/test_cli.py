import subprocess
import sys

import pytest

from pipelive_kv.build_info import build_info
from pipelive_kv.cli import main


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pipelive-kv {build_info().version}\n"


def test_info(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert build_info().compiler in shown
    assert "version" in shown


@pytest.mark.parametrize("arguments", [[], ["demos"], ["demo", "--no-such"], ["info", "more"]])
def test_wrong_arguments(arguments, capsys):
    assert main(arguments) == 2
    assert "usage: pipelive-kv" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    assert main(["demo", "--help"]) == 0
    shown = capsys.readouterr().out
    options = "stages from to requests new-tokens model transport device json quick out corrupt"
    for option in (f"--{name}" for name in options.split()):
        assert option in shown


def test_info_needs_no_torch():
    code = (
        "import sys; from pipelive_kv.cli import main; main(['info']); "
        "assert not {'torch', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
