"""Sixteen clients, a third of them hanging up: no error, no leaked slot. benchmarks/serve_load.py runs longer."""

import asyncio

from benchmarks.serve_load import Load, put_under_load, read_metrics, wait_until_free
from cqlora.engine import LlamaEngine
from tests.serve.fake import fake_config, running


def test_sixteen_clients_of_which_a_third_hangs_up_leave_nothing_behind(tiny):
    limit = 2**20
    engine = LlamaEngine(tiny, "", use_lora=False, prefix_cache_gib=limit / 2**30)
    with running(engine, fake_config(slots=8, queue=32)) as run:
        load = Load(max_tokens=32, hang_up=0.42, most_words=12)
        asyncio.run(put_under_load(run.url, load, clients=16, seconds=3, process=None))
        assert load.errors == []
        assert load.answered > 16 and load.hung_up > 8
        assert asyncio.run(wait_until_free(run.url)) == (0, 0)
        run.wait_until_idle()
        metrics = asyncio.run(read_metrics(run.url))
        assert metrics["cqlora_abandoned_total"] <= load.hung_up
        requests = {name: value for name, value in metrics.items() if name.startswith("cqlora_requests_total")}
        assert not [name for name in requests if 'status="5' in name or 'status="429"' in name]
        assert run.scheduler._batch.free_slots == 8
        assert limit / 2 < engine._prefixes.nbytes <= limit
