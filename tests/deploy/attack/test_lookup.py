"""A warm look-up opens neither the compiler nor the driver; benchmarks/cache_lookup.py times it."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from support import attack


def test_a_warm_look_up_opens_no_library(work, record_property):
    command = attack.worker("lookup", root=work / "root", work=work, rounds=2000)
    reply = attack.run(command, work)
    assert reply["code"] == 0, reply
    assert reply["payload_bytes"] > 4000
    assert not reply["libnvrtc_opened"]
    assert not reply["libcuda_opened"]
    median = reply["microseconds"]["median"]
    record_property(
        "summary", f"look-up and checks of {reply['payload_bytes']} bytes: {median:.0f} µs"
    )
