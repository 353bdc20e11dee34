import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelive_kv.cli import main
from pipelive_kv.demo.options import DemoOptions, OptionError, parse, uneven_counts
from pipelive_kv.placement import Placement


def test_defaults():
    options = parse([])
    assert options == DemoOptions()
    assert options.requests >= 9
    assert options.new_tokens >= 128
    assert options.placements(30) == (
        Placement.from_counts([20, 10]),
        Placement.from_counts([10, 20]),
    )


def test_quick_is_a_default_that_others_override():
    assert parse(["--quick"]).new_tokens < parse([]).new_tokens
    assert parse(["--quick", "--new-tokens", "99"]).new_tokens == 99


@pytest.mark.parametrize(
    ("arguments", "source", "target"),
    [
        (["--from", "12,18"], (12, 18), (18, 12)),
        (["--to", "12,18"], (18, 12), (12, 18)),
        (["--from", "5,25", "--to", "6,24"], (5, 25), (6, 24)),
        (["--from", "0,20,10"], (0, 20, 10), (10, 20, 0)),
        (["--stages", "3"], (15, 10, 5), (5, 10, 15)),
    ],
)
def test_placements(arguments, source, target):
    old, new = parse(arguments).placements(30)
    assert (old.counts, new.counts) == (source, target)


@given(st.integers(2, 8), st.integers(0, 80))
def test_uneven_counts_use_every_layer(stages, more):
    counts = uneven_counts(stages + more, stages)
    assert sum(counts) == stages + more
    assert len(counts) == stages
    assert min(counts) >= 1
    assert list(counts) == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "option", "value", "expected"),
    [
        (["--stages", "1"], "--stages", "1", "2 to 8"),
        (["--stages", "two"], "--stages", "'two'", "2 to 8"),
        (["--stages", "9"], "--stages", "9", "2 to 8"),
        (["--stages", "3", "--from", "20,10"], "--from", "20,10", "3 numbers"),
        (["--from", "20,10", "--to", "10,10,10"], "--to", "10,10,10", "2 numbers"),
        (["--from", "30"], "--from", "'30'", "2 to 8"),
        (["--from", "20,-1"], "--from", "'20,-1'", "0 or more"),
        (["--from", "20;10"], "--from", "'20;10'", "20,10"),
        (["--from", "0,0"], "--from", "'0,0'", "layers per stage"),
        (["--to", ""], "--to", "''", "layers per stage"),
        (["--requests", "1"], "--requests", "1", "2 to 32"),
        (["--requests", "1.5"], "--requests", "'1.5'", "2 to 32"),
        (["--new-tokens", "0"], "--new-tokens", "0", "24 to 1024"),
        (["--device", "gpu"], "--device", "'gpu'", "cpu, cuda, or a GPU"),
        (["--transport", "nccl"], "--transport", "'nccl'", "auto, shm, tcp"),
        (["--model", "/no/such"], "--model", "'/no/such'", "config.json"),
    ],
)
def test_refuses_by_name(arguments, option, value, expected, capsys):
    with pytest.raises(OptionError) as found:
        parse(arguments)
    message = str(found.value)
    assert message.startswith(option)
    assert value in message
    assert expected in message
    assert main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_refuses_an_out_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=r"--out is .*expected a folder"):
        parse(["--out", str(tmp_path / "file")])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--from", "20,11"], "--from is 20,11, 31 layers together; expected 30"),
        (["--to", "20,9"], "--from is 9,20, 29 layers together; expected 30"),
        (["--from", "15,15"], "--to is 15,15, the same as --from"),
    ],
)
def test_refuses_placements_that_do_not_fit_the_model(arguments, says):
    with pytest.raises(OptionError, match=says):
        parse(arguments).placements(30)


def test_refuses_more_stages_than_layers():
    with pytest.raises(OptionError, match="--stages is 8; expected at most 6"):
        parse(["--stages", "8"]).placements(6)
