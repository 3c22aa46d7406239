"""Tests the rules between nodes: names, connections, shared folder and files."""

import pytest

from beit3_ds.cluster.check.link_faults import find_link_faults
from beit3_ds.cluster.check.report import describe_faults, describe_nodes
from beit3_ds.cluster.hostfile import parse_hostfile
from tests.cluster.check.node_answers import all_faults, healthy, machine


@pytest.mark.parametrize(("address", "words"), [(None, "does not resolve"), ("::1", "resolves to ::1")])
def test_an_own_name_that_others_cannot_use_is_noted_if_ranks_get_by(address: str | None, words: str) -> None:
    inspection = healthy(2)
    machine(inspection.answers[1])["own_name"] = address
    (note,) = find_link_faults(inspection)
    assert note.is_note and note.host == "node1" and f"'node1' {words} there" in note.text
    assert "~eth0 10.0.0.2" in describe_nodes(inspection, [note])
    said = describe_faults(parse_hostfile("a slots=1\n", "hosts"), [note])
    assert said.startswith("note: node1: ") and said.endswith("no fault found")
    inspection.answers[1].interface = None  # nobody knows which to take
    (fault,) = find_link_faults(inspection)
    assert not fault.is_note and "set GLOO_SOCKET_IFNAME" in fault.text


def test_two_sides_that_do_not_share_are_told_by_the_smaller() -> None:
    inspection = healthy(5)
    sides = ("node0", "node1"), ("node2", "node3", "node4")
    for node in inspection.answers:
        node.tokens_missing = sides[0] if node.name in sides[1] else sides[1]
    assert [fault.split(":")[0] for fault in all_faults(inspection)] == ["node0", "node1"]


def test_connections_that_fail_are_told_once_a_node_or_once_a_pair() -> None:
    inspection = healthy(4)
    for name in ("node0", "node1", "node3"):
        inspection.answers[["node0", "node1", "node2", "node3"].index(name)].connections["node2"] = {
            "error": "no route"
        }
    (fault,) = all_faults(inspection)
    assert fault.startswith("node2: no other node can connect to it (10.0.0.3, port 40000): no route.")

    inspection = healthy(4)
    inspection.answers[1].connections["node2"] = {"error": "no answer within 3 s"}
    (fault,) = all_faults(inspection)
    assert fault.startswith("node1: cannot connect to node2 (10.0.0.3, port 40000): no answer within 3 s. Open all")

    inspection = healthy(2)
    inspection.answers[1].connections["node0"] = {"error": "no route"}
    inspection.named_master["node1"]["error"] = "no route"  # neither by its name
    (fault,) = all_faults(inspection)
    assert "DeepSpeed's MASTER_ADDR" in fault and "--master_addr" not in fault


def test_one_machine_in_two_lines_is_told() -> None:
    inspection = healthy(3)
    machine(inspection.answers[2])["identity"] = machine(inspection.answers[0])["identity"]
    (fault,) = all_faults(inspection)
    assert fault.startswith("node2: is the same machine as node0")
    for node in inspection.answers:
        machine(node)["identity"] = [None, "net"]  # not known: nothing is said
    assert not all_faults(inspection)


def test_data_that_no_node_has_is_told_once_and_a_tokenizer_may_still_be_trained() -> None:
    inspection = healthy(3)
    for node in inspection.answers:
        assert node.files is not None
        node.files["a-*.tar"] = (0, "")
    (fault,) = all_faults(inspection)
    assert fault.startswith("no node has files that match 'a-*.tar' (from /home/me). Correct")
    table = describe_nodes(inspection, list(find_link_faults(inspection)))
    assert table.count("!0") == 3
    inspection = healthy(3)
    for node in inspection.answers[:2]:
        assert node.files is not None
        node.files["words.spm"] = (1, "trained")
    (fault,) = all_faults(inspection)
    assert fault.startswith("node2: no file matches 'words.spm' (from /home/me), unlike other nodes")
