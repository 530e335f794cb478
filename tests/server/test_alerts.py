"""Each alert fires where its fault is, after its time and not before, and nothing fires where all is well.

`promtool` evaluates the rules that are shipped over series as a server with that fault has them; what makes a server
have these is in `metrics/test_planted.py` and `test_http.py`.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yml"
DAY = 1440
"""The minutes that a series has."""
WELL = {
    "up": "1x{n}",
    'async_cache_problem{what="task"}': "0x{n}",
    'async_cache_problem{what="sweeper"}': "0x{n}",
    'async_cache_backend_breaker{backend="disk",state="closed"}': "1x{n}",
    'async_cache_backend_breaker{backend="disk",state="open"}': "0x{n}",
    'async_cache_backend_breaker{backend="disk",state="half-open"}': "0x{n}",
    'async_cache_l1_bytes{state="quarantined"}': "0x{n}",
    'async_cache_loop_lag_seconds_bucket{le="0.01"}': "0+120x{n}",
    'async_cache_loop_lag_seconds_bucket{le="0.5"}': "0+120x{n}",
    'async_cache_loop_lag_seconds_bucket{le="+Inf"}': "0+120x{n}",
    "async_cache_requests_total": "0+600x{n}",
    "async_cache_promises_kept_total": "0+600x{n}",
    'async_cache_promises_broken_total{reason="backend_error"}': "0x{n}",
    'async_cache_promises_broken_total{reason="cancelled"}': "0+300x{n}",
    'async_cache_promises_trimmed_total{reason="memory"}': "0+6x{n}",
    "async_cache_writeback_dropped_chunks_total": "0x{n}",
    'async_cache_swept_total{kind="lease"}': "0x{n}",
    "async_cache_prefix_cache_queries_total": "0+6000x{n}",
    'async_cache_prefix_cache_hits_total{tier="l1"}': "0+3000x{n}",
}

FAULTS: dict[str, dict[str, str]] = {
    "AsyncCacheDown": {"up": "0"},
    "AsyncCacheStuck": {'async_cache_problem{what="task"}': "1"},
    "AsyncCacheBackendLeftAlone": {
        'async_cache_backend_breaker{backend="disk",state="closed"}': "0",
        'async_cache_backend_breaker{backend="disk",state="open"}': "1",
    },
    "AsyncCacheQuarantine": {'async_cache_l1_bytes{state="quarantined"}': "4096"},
    "AsyncCacheLoopLags": {
        'async_cache_loop_lag_seconds_bucket{le="0.01"}': "+100",
        'async_cache_loop_lag_seconds_bucket{le="0.5"}': "+120",
    },
    "AsyncCachePromisesBroken": {'async_cache_promises_broken_total{reason="backend_error"}': "+12"},
    "AsyncCacheMemoryShort": {'async_cache_promises_trimmed_total{reason="memory"}': "+60"},
    "AsyncCacheWritesDropped": {"async_cache_writeback_dropped_chunks_total": "+60"},
    "AsyncCacheNobodyComesBack": {'async_cache_swept_total{kind="lease"}': "+60"},
    "AsyncCacheHitRateFell": {'async_cache_prefix_cache_hits_total{tier="l1"}': "+600"},
}
"""By alert, what is otherwise from a moment on: a value, or what is added each minute."""
BEGINS = {"AsyncCacheHitRateFell": 600}
"""When it begins, in minutes; at once where nothing is said: a rate is compared with that of the day before."""
LATE = {"AsyncCacheHitRateFell": 30}
"""Minutes of the fault that a rate needs to be seen in it."""
HELD = {
    match[1]: int(match[2]) * {"m": 1, "h": 60}[match[3]]
    for match in re.finditer(r"- alert: (\w+).*?\n +for: (\d+)([mh])", RULES.read_text(), re.DOTALL)
}


def labelled(series: str) -> str:
    name, _, labels = series.partition("{")
    return f'{name}{{job="async_cache",instance="here"{"," + labels if labels else "}"}'


def values(well: str, fault: str | None, begins: int) -> str:
    """A series that is well until a moment, and then, where there is a fault, is not, up to the end of the day."""
    if fault is None:
        return well.format(n=DAY)
    before = well.format(n=begins)
    if not fault.startswith("+"):
        return f"{before} {fault}x{DAY - begins}"
    step = re.fullmatch(r"0\+(\d+)x.*", well)
    reached = int(step[1]) * begins if step else 0
    return f"{before} {reached + int(fault)}{fault}x{DAY - begins}"


def fired(directory: Path, faults: dict[str, str], begins: int, at: list[int], alert: str) -> list[bool]:
    """Whether an alert fires, at each of these minutes."""
    told = []
    for minute in at:
        case: dict[str, Any] = {
            "interval": "1m",
            "input_series": [
                {"series": labelled(series), "values": values(well, faults.get(series), begins)}
                for series, well in WELL.items()
            ],
            "alert_rule_test": [{"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": []}],
        }
        tests = directory / "tests.yml"
        tests.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [case]}))
        promtool = shutil.which("promtool")
        assert promtool is not None, "apt-get install prometheus"
        done = subprocess.run([promtool, "test", "rules", str(tests)], capture_output=True, text=True, timeout=150)
        assert done.returncode == 0 or "exp:[" in done.stderr + done.stdout, done.stderr + done.stdout
        told.append(done.returncode != 0)
    return told


def test_each_alert_has_a_fault() -> None:
    assert list(HELD) == list(FAULTS)
    assert {series for fault in FAULTS.values() for series in fault} <= set(WELL)


@pytest.mark.parametrize("alert", FAULTS)
def test_it_fires_where_its_fault_is_and_not_before(alert: str, tmp_path: Path) -> None:
    begins, late, held = BEGINS.get(alert, 60), LATE.get(alert, 10), HELD[alert]
    at = [begins, begins + held - 1, begins + held + late + 1]
    assert fired(tmp_path, FAULTS[alert], begins, at, alert) == [False, False, True]


@pytest.mark.parametrize("alert", FAULTS)
def test_it_is_silent_where_all_is_well(alert: str, tmp_path: Path) -> None:
    assert fired(tmp_path, {}, 60, [60, DAY], alert) == [False, False]


@pytest.mark.parametrize("alert", FAULTS)
def test_other_faults_do_not_fire_it(alert: str, tmp_path: Path) -> None:
    others = {series: value for other, fault in FAULTS.items() if other != alert for series, value in fault.items()}
    own = set(FAULTS[alert])
    assert fired(tmp_path, {s: v for s, v in others.items() if s not in own}, 60, [600], alert) == [False]
