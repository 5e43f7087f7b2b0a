"""Ports on which engines of a cluster say where their KV is."""

import socket

import pytest

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `cluster`")

from vllm_agentserve.cluster.engine import EngineError
from vllm_agentserve.cluster.server import PORTS_APART, free_ports

HOST = "127.0.0.1"


def test_ports_that_are_taken_are_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = free_ports(HOST, port - 1, 3)
        assert port not in range(found, found + 3)
        assert port < found < port - 1 + PORTS_APART


def test_an_address_of_no_machine_is_said() -> None:
    with pytest.raises(
        EngineError, match=r"no 2 ports in a row are free on 192\.0\.2\.1 from 15600 on.*VLLM_NIXL_SIDE_CHANNEL_PORT"
    ):
        free_ports("192.0.2.1", 15600, 2)
