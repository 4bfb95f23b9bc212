"""Prometheus metrics, under the names gateways expect, and the sliding window behind `/flexllm/stats`."""

from __future__ import annotations

import collections
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flexllm.config import SchedulerConfig
from flexllm.core import FinishReason, JobEvent
from flexllm.server.choices import Choice
from flexllm.server.protocol import STEP_KINDS, Stats
from flexllm.server.store import JobRecord

WINDOW_SECONDS = 60.0
RATE_SECONDS = 20.0  # over which a job's tokens/s is taken, at least two steps though
SHOWN_JOBS = 20  # the latest ones
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60)


@dataclass(frozen=True)
class FinishedRequest:
    """Seconds. `tpot` is None for a request of one token."""

    end: float
    ttft: float
    tpot: float | None
    ttft_attained: bool
    tpot_attained: bool


@dataclass
class JobProgress:
    """The live figures of a job, from its events."""

    job_id: str
    status: str = "running"
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    tokens: int = 0
    history: deque[tuple[float, int, int]] = field(default_factory=deque)  # (when, step, tokens), one per step lately


class Metrics:
    def __init__(self, config: SchedulerConfig, model_name: str) -> None:
        self.scheduler = config  # requests are judged by its objectives when they end
        self.registry = CollectorRegistry()
        self.engine_stats: dict[str, Any] = {}
        self.jobs: dict[str, JobProgress] = {}
        self.adapters_in_use: collections.Counter[str] = collections.Counter()
        self._finished: deque[FinishedRequest] = deque()
        self._steps: deque[tuple[float, str, float]] = deque()  # (when, kind, seconds)
        self._num_finished = 0
        labels = ("model_name",)

        def histogram(name: str, text: str) -> Any:
            return Histogram(name, text, labels, registry=self.registry, buckets=LATENCY_BUCKETS).labels(model_name)

        self._ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token, queueing included.")
        self._gap = histogram("vllm:inter_token_latency_seconds", "Time between two tokens of a request.")
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.")
        self._queue = histogram("vllm:request_queue_time_seconds", "Arrival to the first iteration that runs the request.")
        self._prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens.", labels, registry=self.registry).labels(model_name)
        self._generation_tokens = Counter("vllm:generation_tokens", "Tokens generated.", labels, registry=self.registry).labels(model_name)
        self._success = Counter("vllm:request_success", "Requests by how they ended.", (*labels, "finished_reason"), registry=self.registry)
        self._step_seconds = Histogram(
            "flexllm:step_seconds", "Iterations by what they held.", ("kind",), registry=self.registry, buckets=LATENCY_BUCKETS
        )
        # From the first scrape on: what counts only from its first event, a rate cannot see rise.
        for kind in STEP_KINDS:
            self._step_seconds.labels(kind)
        for reason in FinishReason:
            self._success.labels(model_name, reason.value)
        self._loss = Gauge("flexllm:finetune_loss", "Training loss of a job's latest step.", ("job",), registry=self.registry)
        self.model_name = model_name
        self.registry.register(_Derived(self))

    # ------------------------------------------------------------------------------------------------------ observation
    def request_began(self, choice: Choice) -> None:
        if choice.adapter is not None:
            self.adapters_in_use[choice.adapter] += 1

    def token_gap(self, seconds: float) -> None:
        self._gap.observe(seconds)

    def request_ended(self, choice: Choice) -> None:
        """For whatever reason; a choice without a finish reason was given up by its client or by the engine."""
        if choice.adapter is not None:
            self.adapters_in_use -= collections.Counter([choice.adapter])
        self._prompt_tokens.inc(len(choice.prompt.ids))
        self._generation_tokens.inc(choice.num_tokens)
        self._success.labels(self.model_name, choice.finish_reason or "abort").inc()
        if choice.first_token is None or choice.last_token is None or choice.finish_reason is None:
            return
        ttft = choice.first_token - choice.arrival
        tpot = (choice.last_token - choice.first_token) / (choice.num_tokens - 1) if choice.num_tokens > 1 else None
        slo = self.scheduler.slo_of(choice.priority)
        self._ttft.observe(ttft)
        self._e2e.observe(choice.last_token - choice.arrival)
        self._finished.append(FinishedRequest(choice.last_token, ttft, tpot, ttft <= slo.ttft, tpot is None or tpot <= slo.tpot))
        self._num_finished += 1

    def engine(self, stats: Stats) -> None:
        now = time.monotonic()
        self.engine_stats = stats.engine
        for kind, seconds in stats.steps:
            self._step_seconds.labels(kind).observe(seconds)
            self._steps.append((now, kind, seconds))
        for seconds in stats.queue_seconds:
            self._queue.observe(seconds)
        self._trim(now)

    def job_event(self, event: JobEvent) -> None:
        job = self.jobs.setdefault(event.job_id, JobProgress(event.job_id))
        if event.kind == "step":
            now = time.monotonic()
            job.history.append((now, event.step, event.tokens))
            while len(job.history) > 2 and job.history[0][0] < now - RATE_SECONDS:
                job.history.popleft()
            job.step, job.total_steps, job.loss, job.tokens = event.step, event.total_steps, event.loss, event.tokens
            if event.loss is not None:
                self._loss.labels(event.job_id).set(event.loss)

    def job_status(self, job_id: str, status: str) -> None:
        job = self.jobs.setdefault(job_id, JobProgress(job_id))
        job.status = status
        job.history.clear()  # the clock of its rates starts when it runs, not while it is paused
        if status == "running":
            job.history.append((time.monotonic(), job.step, job.tokens))

    def restore_job(self, job: JobRecord) -> None:
        """A job that an earlier life of the server has begun."""
        self.jobs[job.id] = JobProgress(job.id, job.status, job.step, job.total_steps, tokens=job.trained_tokens or 0)

    def engine_lost(self) -> None:
        self.engine_stats = {}

    # ---------------------------------------------------------------------------------------------------------- figures
    def tokens_per_second(self, job_id: str) -> float:
        """Tokens trained (forward and backward) per second over the latest steps."""
        seconds, _, tokens = self._recent_progress(job_id)
        return tokens / seconds if seconds > 0 else 0.0

    def estimated_finish(self, job_id: str) -> int | None:
        """Unix time, at the pace of the latest steps."""
        seconds, steps, _ = self._recent_progress(job_id)
        if not steps:
            return None
        job = self.jobs[job_id]
        return round(time.time() + (job.total_steps - job.step) * seconds / steps)

    def _recent_progress(self, job_id: str) -> tuple[float, int, int]:
        """(seconds, steps, tokens) between the oldest and the newest step remembered."""
        job = self.jobs.get(job_id)
        if job is None or len(job.history) < 2:
            return 0.0, 0, 0
        (t0, step0, tokens0), (t1, step1, tokens1) = job.history[0], job.history[-1]
        return t1 - t0, step1 - step0, tokens1 - tokens0

    def window(self) -> Sequence[FinishedRequest]:
        self._trim(time.monotonic())
        return self._finished

    def snapshot(self) -> dict[str, Any]:
        """The body of `/flexllm/stats`, times in the units their names say."""
        window, stats, slo = self.window(), self.engine_stats, self.scheduler.slo
        ttfts = [r.ttft * 1e3 for r in window]
        tpots = [r.tpot * 1e3 for r in window if r.tpot is not None]
        busy: dict[str, float] = {}
        for _, kind, seconds in self._steps:
            busy[kind] = busy.get(kind, 0.0) + seconds
        return {
            "slo": {"ttft": slo.ttft, "tpot": slo.tpot, "attainment": self.attainment()["both"]},
            "ttft_ms": {"p50": quantile(ttfts, 0.5), "p99": quantile(ttfts, 0.99)},
            "tpot_ms": {"p50": quantile(tpots, 0.5), "p99": quantile(tpots, 0.99)},
            "step": dict.fromkeys(("decode", "prefill", "window", "backward"), 0) | stats.get("step", {}) | {"slack": stats.get("slack")},
            "busy_seconds": {"window": WINDOW_SECONDS, **busy},
            "requests": {"running": stats.get("num_running", 0), "waiting": stats.get("num_waiting", 0), "finished": self._num_finished},
            "jobs": [
                {
                    "id": job.job_id,
                    "status": job.status,
                    "step": job.step,
                    "total_steps": job.total_steps,
                    "loss": job.loss,
                    "tokens_per_second": self.tokens_per_second(job.job_id),
                }
                for job in list(self.jobs.values())[-SHOWN_JOBS:]
            ],
            "memory": stats.get("memory", {}),
            "kv_usage": stats.get("kv_usage", 0.0),
            "prediction_error": stats.get("prediction_error"),
        }

    def attainment(self) -> dict[str, float | None]:
        """Share of the window's requests within the objectives of their class; None when there were none."""
        window = self.window()
        if not window:
            return {"ttft": None, "tpot": None, "both": None}
        n = len(window)
        return {
            "ttft": sum(r.ttft_attained for r in window) / n,
            "tpot": sum(r.tpot_attained for r in window) / n,
            "both": sum(r.ttft_attained and r.tpot_attained for r in window) / n,
        }

    def _trim(self, now: float) -> None:
        while self._finished and self._finished[0].end < now - WINDOW_SECONDS:
            self._finished.popleft()
        while self._steps and self._steps[0][0] < now - WINDOW_SECONDS:
            self._steps.popleft()


class _Derived(Collector):
    """What the engine counts itself, and what the window says: read at scrape time."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        stats, name = self._metrics.engine_stats, self._metrics.model_name
        yield _gauge("vllm:num_requests_running", "Requests in the batch.", ["model_name"], [([name], stats.get("num_running", 0))])
        yield _gauge("vllm:num_requests_waiting", "Requests that wait for pages.", ["model_name"], [([name], stats.get("num_waiting", 0))])
        yield _gauge("vllm:kv_cache_usage_perc", "KV pages in use, 0 to 1.", ["model_name"], [([name], stats.get("kv_usage", 0.0))])
        yield _counter("vllm:num_preemptions", "Requests sent back to wait.", ["model_name"], [([name], stats.get("num_preemptions", 0))])
        adapters = ",".join(sorted(self._metrics.adapters_in_use))
        yield _gauge("vllm:lora_requests_info", "Adapters of requests in flight.", ["running_lora_adapters"], [([adapters], time.time())])
        attained = [([slo], share) for slo, share in self._metrics.attainment().items() if share is not None]
        yield _gauge("flexllm:slo_attainment_ratio", "Share of recent requests within the objective.", ["slo"], attained)
        tokens = [([job, phase], n) for job, phases in stats.get("finetune_tokens", {}).items() for phase, n in phases.items()]
        yield _counter("flexllm:finetune_tokens", "Training tokens done.", ["job", "phase"], tokens)
        memory = [([pool], n) for pool, n in stats.get("memory", {}).items()]
        yield _gauge("flexllm:memory_bytes", "Bytes in use.", ["pool"], memory)
        for key, metric, text in (
            ("prediction_error", "flexllm:latency_prediction_error_ratio", "Typical error of predicted iteration times."),
            ("slack", "flexllm:slack_seconds", "What the latest iteration could spend on finetuning."),
        ):
            value = stats.get(key)
            yield _gauge(metric, text, [], [([], value)] if value is not None else [])


Samples = Iterable[tuple[list[str], float]]


def _gauge(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    metric = GaugeMetricFamily(name, text, labels=labels)
    for values, sample in samples:
        metric.add_metric(values, sample)
    return metric


def _counter(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    metric = CounterMetricFamily(name, text, labels=labels)
    for values, sample in samples:
        metric.add_metric(values, sample)
    return metric


def quantile(values: Sequence[float], q: float) -> float | None:
    """Nearest rank; None of an empty sequence."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
