"""Everything in Python that decodes what a peer, a file or another process says.

What is decoded is either of the right shape or one of our errors, which name what was wrong; what
was written is read again as it was.
"""

from __future__ import annotations

import contextlib
import json
import struct
import types
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelive_kv import messages
from pipelive_kv.control import ControlKey, wire
from pipelive_kv.errors import CorruptError, InvalidArgumentError, PipeliveError, ProtocolError
from pipelive_kv.record import Decision, FileDecisionRecord
from pipelive_kv.transport import Address, handshake
from pipelive_kv.transport.abilities import Abilities, choose

KEY = b"0123456789abcdef0123456789abcdef"

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=6)
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def values_of(kind):
    """Values that a field of this type takes."""
    if isinstance(kind, types.UnionType):
        return st.one_of([values_of(part) for part in typing.get_args(kind)])
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if len(parts) == 2 and parts[1] is Ellipsis:
            return st.lists(values_of(parts[0]), max_size=3).map(tuple)
        return st.tuples(*map(values_of, parts))
    if origin is dict:
        return st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return messages_of(kind)
    return {
        int: st.integers(-(2**63), 2**63 - 1),
        str: st.text(max_size=8),
        bool: st.booleans(),
        float: st.floats(allow_nan=False),
        type(None): st.none(),
    }[kind]


def messages_of(kind):
    hints = typing.get_type_hints(kind)
    fields = {name: values_of(hints[name]) for name in kind.__struct_fields__}
    return st.builds(kind, **fields)


requests = st.one_of([messages_of(kind) for kind in typing.get_args(messages.Request)])
answers = st.one_of([messages_of(kind) for kind in typing.get_args(messages.Answer)])
calls = st.builds(wire.Call, st.integers(0, 2**32), requests)
replies = st.builds(wire.Reply, st.integers(0, 2**32), answers)


def decoded(content):
    try:
        return wire.decode(content)
    except ProtocolError:
        return None


@given(calls | replies)
def test_every_message_survives_the_way(frame):
    assert wire.decode(wire.encode(frame)) == frame


@given(st.binary(max_size=200))
def test_bytes_are_a_frame_or_a_protocol_error(content):
    decoded(content)


@given(trees)
def test_what_is_packed_otherwise_is_refused(tree):
    found = decoded(msgspec.msgpack.encode(tree))
    assert found is None or isinstance(found, wire.Hello | wire.Welcome)


@given(calls | replies, st.data())
def test_a_changed_field_is_another_message_or_none(frame, data):
    """A field too many, one too few, or one of another type."""
    tree = msgspec.msgpack.decode(wire.encode(frame))
    inside = data.draw(st.sampled_from([tree, tree["body"]]))
    name = data.draw(st.sampled_from(sorted(inside)) | st.text(max_size=6))
    if name in inside and data.draw(st.booleans()):
        del inside[name]
    else:
        inside[name] = data.draw(trees)
    found = decoded(msgspec.msgpack.encode(tree))
    if found is not None:
        assert wire.decode(wire.encode(found)) == found


@given(calls, st.data())
def test_a_cut_or_changed_frame_is_never_half_understood(frame, data):
    content = bytearray(wire.encode(frame))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    found = decoded(bytes(content[: data.draw(st.integers(0, len(content)))]))
    assert found is None or wire.decode(wire.encode(found)) == found


@pytest.mark.parametrize("content", [b"\x91" * (1 << 20), b"\x81\xa1a" * (1 << 18)])
def test_deep_nesting_is_refused(content):
    with pytest.raises(ProtocolError, match="malformed"):
        wire.decode(content)


@given(st.binary(max_size=120))
def test_an_error_of_any_name_is_one_of_ours(text):
    failure = wire.Failure(1, text.decode("latin1"), "why")
    assert isinstance(wire.error_of(failure, "stage/0"), PipeliveError)


# -- the handshake of patch connections ------------------------------------------------------------


def fed(steps, body):
    """Give a fresh handshake one frame; what it asks for then, or its error."""
    wish = next(steps)
    while isinstance(wish, handshake.Send):
        wish = steps.send(b"")
    with contextlib.suppress(ProtocolError):
        steps.send(struct.pack(">I", len(body)))
        return steps.send(body)
    return None


@given(trees | st.dictionaries(st.sampled_from(["protocol", "version", "nonce", "mac"]), trees))
def test_a_handshake_takes_no_other_frame(tree):
    body = json.dumps(tree).encode()
    for steps in (handshake.client(KEY, {}), handshake.server(KEY, {}, "tcp")):
        assert fed(steps, body) is None


@given(st.integers(), st.text(max_size=20), st.binary(max_size=40))
def test_an_opening_of_another_kind_is_refused(version, protocol, nonce):
    body = msgspec.json.encode(
        {"protocol": protocol, "version": version, "nonce": nonce}, enc_hook=str
    )
    assert fed(handshake.server(KEY, {}, "tcp"), body) is None


@given(trees | st.dictionaries(st.text(max_size=9).map(lambda n: f"transport.{n}"), scalars))
def test_what_a_hello_claims_is_of_the_right_kind_or_not_said(tree):
    try:
        hello = handshake._decode_hello(json.dumps(tree).encode())
    except ProtocolError:
        return
    said = Abilities.of_hello(hello)
    for name, default in vars(Abilities()).items():
        assert type(getattr(said, name)) is type(default)
    for base in ("tcp", "shm"):
        with contextlib.suppress(ProtocolError):
            assert choose(said, Abilities(), base)[0] in ("host", "p2p", "nccl")


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(vars(Abilities()), scalars),
    )
)
def test_abilities_of_any_values(fields):
    said = Abilities.of_hello({f"transport.{name}": value for name, value in fields.items()})
    for other in (Abilities(), Abilities("auto", "cuda:0", "a", True, "", 22703, "")):
        with contextlib.suppress(ProtocolError):
            choose(said, other, "shm")
            choose(other, said, "shm")


# -- files and addresses ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return FileDecisionRecord(tmp_path_factory.mktemp("record"))


@given(
    content=st.binary(max_size=80)
    | trees.map(lambda tree: json.dumps(tree).encode())
    | st.dictionaries(st.sampled_from(Decision.__struct_fields__), trees).map(
        lambda tree: json.dumps(tree).encode()
    )
)
def test_a_decision_is_read_as_it_is_or_refused(record, content):
    (record.directory / "epoch-00000007.json").write_bytes(content)
    try:
        found = record.read(7)
    except CorruptError:
        return
    assert found == msgspec.json.decode(content, type=Decision)
    assert found.epoch == 7


def test_what_else_lies_beside_the_decisions_is_nobodys(tmp_path):
    record = FileDecisionRecord(tmp_path)
    record.decide(Decision(3, "abort"))
    for name in (
        "epoch-x.json",
        "epoch-.json",
        "epoch-99.json.swp",
        "epoch-+0000099.json",
        "README",
    ):
        (tmp_path / name).write_text("no decision")
    assert record.newest_epoch() == 3
    (tmp_path / "epoch-00000004.json").mkdir()
    with pytest.raises(CorruptError, match="epoch-00000004"):
        record.read(4)


@given(st.text(max_size=60) | st.text(max_size=40).map(lambda rest: f"tcp://{rest}"))
def test_an_address_is_parsed_or_named(text):
    try:
        address = Address.parse(text)
    except InvalidArgumentError:
        return
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "tcp://user@h:1",
        "tcp://h:1/path",
        "tcp://h:1?x=1",
        "tcp://h\n:1",
        "tcp://h:1#x",
        b"tcp://h:1",
    ],
)
def test_more_than_an_address_is_refused(text):
    with pytest.raises(InvalidArgumentError, match="address is"):
        Address.parse(text)


@given(content=st.binary(max_size=100) | trees.map(lambda tree: json.dumps(tree).encode()))
def test_a_key_is_a_key_or_refused(content):
    with pytest.raises(InvalidArgumentError, match="not a control key"):
        ControlKey.from_bytes(content)


KEY_FILE = json.loads(ControlKey.generate().to_bytes())


@given(st.sampled_from(sorted(KEY_FILE)), st.text(min_size=40, max_size=40) | trees)
def test_a_key_with_a_changed_part_is_refused(name, value):
    content = json.dumps({**KEY_FILE, name: value}).encode()
    with pytest.raises(InvalidArgumentError, match="not a control key"):
        ControlKey.from_bytes(content)


def test_a_key_file_is_looked_at_before_it_is_read(tmp_path):
    key = ControlKey.generate()
    key.save(tmp_path / "key")
    (tmp_path / "link").symlink_to(tmp_path / "key")
    assert ControlKey.load(tmp_path / "link") == key
    (tmp_path / "link").unlink()
    (tmp_path / "key").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "key")
    with pytest.raises(InvalidArgumentError, match="0640, expected 0600"):
        ControlKey.load(tmp_path / "link")
