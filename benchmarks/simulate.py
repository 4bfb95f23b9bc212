"""How far the simulator is from a measurement: the requests of a result of coserve.py, once more on the virtual clock.

Iterations take what the engine's profile says, taken here and now, times one factor that makes the simulated TPOT without
finetuning the measured one (server, client and whatever else was on the machine). Co-serving is then predicted, not fitted.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, finish, log, parser
from flexllm.config import SLO, SchedulerConfig
from flexllm.core import FinetuneJob, SaveLevel
from flexllm.llm import LLM
from flexllm.scheduler.latency import LatencyModel
from flexllm.simulate.simulator import Machine, SimulationResult, simulate
from flexllm.simulate.workload import Arrival

SEQUENCE = 256  # tokens of a training example of coserve.py, nearly
NOISE = 0.3  # sigma of the log of an iteration's time: a shared machine
FITTING_ROUNDS = 4


def slowed(stored: dict[str, Any], factor: float) -> Machine:
    latency = LatencyModel({k: factor * v for k, v in stored["coefficients"].items()}, [factor * s for s in stored["slopes"]])
    return Machine(latency, num_blocks=4096, finetune_bytes=1 << 40)  # memory was no limit


def figures(result: SimulationResult, slo: SLO) -> dict[str, float]:
    s = result.summary(slo)
    return {
        "p50_ttft_ms": 1e3 * s["ttft_p50"],
        "p50_tpot_ms": 1e3 * s["tpot_p50"],
        "p99_tpot_ms": 1e3 * s["tpot_p99"],
        "attainment": s["attainment"],
        "finetune_tok_s": s["finetune_rate"],
    }


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--measured", type=Path, default=RESULTS / "coserve_windows_wait.json", help="a result of coserve.py")
    args = options.parse_args()
    measured = json.loads(args.measured.read_text())
    slo = SLO(measured["slo"]["ttft_s"], measured["slo"]["tpot_s"])
    requests = measured["samples"]["coserve"][0]["requests"]
    trace = sorted((Arrival(r["due"], r["prompt_tokens"], r["output_tokens"]) for r in requests), key=lambda arrival: arrival.time)
    with LLM(args.model, threads=args.threads) as llm, tempfile.TemporaryDirectory() as folder:
        layers = llm.model_config.num_layers
        llm.latency.save(Path(folder, "profile.json"))
        stored = json.loads(Path(folder, "profile.json").read_text())
    lengths = [SEQUENCE] * 200
    job = FinetuneJob("job", lengths, lengths, 1, epochs=1 << 20, num_layers=layers, levels=(SaveLevel("keep", 1),))

    def run(mode: str, factor: float) -> SimulationResult:
        config = replace(SchedulerConfig(slo=slo), mode=mode)
        return simulate(trace, [job], config, slowed(stored, factor), seconds=measured["load"]["seconds"], noise=NOISE, seed=args.seed)

    factor, wanted = 1.0, measured["inference_only"]["p50_tpot_ms"]
    for _ in range(FITTING_ROUNDS):
        factor *= wanted / figures(run("inference", factor), slo)["p50_tpot_ms"]
    log(f"iterations take {factor:.2f} x their profile")
    predicted = {"inference_only": figures(run("inference", factor), slo), "coserve": figures(run("coserve", factor), slo)}
    found = {
        "inference_only": {name: measured["inference_only"].get(name, 0.0) for name in predicted["inference_only"]},
        "coserve": {name: measured["coserve"].get(name, measured["finetune_tok_s"]) for name in predicted["coserve"]},
    }
    ratios = {name: predicted["coserve"][name] / found["coserve"][name] for name in found["coserve"]}
    fields = {"factor": factor, "ratio": ratios, "predicted": predicted, "measured": found, "measured_at": measured["commit"]}
    finish("simulate", args, fields, [[p["finetune_tok_s"] for p in measured["samples"]["coserve"]]])


if __name__ == "__main__":
    main()
