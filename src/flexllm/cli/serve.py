"""`flexllm serve`: the OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexllm import config as settings
from flexllm.cli.options import DEFAULT_MODEL, Device, Dtype, MaxModelLen, Model, Quantization, Threads, model_ref
from flexllm.config import SLO, CacheConfig, EngineConfig, SchedulerConfig
from flexllm.core import BATCH


def serve(
    model: Model = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Ask clients for this key. \\[default: $FLEXLLM_API_KEY]", show_default=False)] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the base model. \\[default: its folder's]", show_default=False)
    ] = None,
    slo_ttft: Annotated[float, typer.Option(help="Objective for the time to the first token, seconds, queueing included.")] = 1.0,
    slo_tpot: Annotated[float, typer.Option(help="Objective for the time per output token after it, seconds.")] = 0.1,
    flex_slo_ttft: Annotated[
        float | None, typer.Option(help="The same for requests with service_tier flex. \\[default: ten times as long]", show_default=False)
    ] = None,
    flex_slo_tpot: Annotated[float | None, typer.Option(help="\\[default: three times as long]", show_default=False)] = None,
    mode: Annotated[str, typer.Option(help="coserve, temporal, inference or finetune: who gets the device.")] = "coserve",
    temporal_steps: Annotated[
        int, typer.Option(help="Mode temporal: inference iterations between two of finetuning; 0: dynamic.", min=0)
    ] = SchedulerConfig.temporal_inference_steps,
    max_running: Annotated[int, typer.Option(help="Most requests in the batch.")] = 64,
    max_batch_tokens: Annotated[int, typer.Option(help="Most inference tokens in one iteration.")] = 512,
    kv_cache_gb: Annotated[
        float | None, typer.Option(help="Size of the KV cache, GB. \\[default: a share of free memory]", show_default=False)
    ] = None,
    finetune_gb: Annotated[
        float | None, typer.Option(help="What finetuning may hold besides, GB. \\[default: a share of free memory]", show_default=False)
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Database, files, adapters, checkpoints. \\[default: in the user's data folder]", show_default=False)
    ] = None,
    enable_adapter_loading: Annotated[
        bool, typer.Option("--enable-adapter-loading", help="Allow /v1/load_lora_adapter and unload.")
    ] = False,
    adapter_dir: Annotated[Path | None, typer.Option(help="The one folder adapters may be loaded from.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write what every iteration does to this file; see `flexllm trace`.", show_default=False)
    ] = None,
    max_adapters: Annotated[int, typer.Option(help="Adapters resident at once, serving and training.")] = 32,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
) -> None:
    """Serve MODEL over OpenAI's API, and finetune adapters of it in the slack that the latency objectives leave.

    \b
    flexllm serve
    flexllm serve ./my-model --port 9000 --slo-ttft 0.5 --slo-tpot 0.05
    flexllm serve default --enable-adapter-loading --adapter-dir ./adapters --api-key secret

    Then, with the official client: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="secret").
    """
    for option, size in (("kv-cache-gb", kv_cache_gb), ("finetune-gb", finetune_gb)):
        if size is not None and not size > 0:
            raise ValueError(f"{option} must be positive, got {size}")
    flex = SLO(
        10 * slo_ttft if flex_slo_ttft is None else flex_slo_ttft,
        3 * slo_tpot if flex_slo_tpot is None else flex_slo_tpot,
    )
    engine_config = EngineConfig(
        model=model_ref(model),
        dtype=dtype,
        quantization=quantization,
        device=device,
        threads=threads,
        max_model_len=max_model_len,
        max_adapters=max_adapters,
        cache=CacheConfig(kv_bytes=_bytes(kv_cache_gb), finetune_bytes=_bytes(finetune_gb)),
        scheduler=SchedulerConfig(
            mode=mode,
            slo=SLO(slo_ttft, slo_tpot),
            class_slos={BATCH: flex},
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            temporal_inference_steps=temporal_steps,
        ),
        state_dir=state_dir or settings.state_dir(),
        trace=trace,
    )
    if enable_adapter_loading and adapter_dir is None:
        raise ValueError("--enable-adapter-loading needs --adapter-dir, the one folder that adapters may come from")

    from flexllm.server.main import run_server

    run_server(
        engine_config,
        host=host,
        port=port,
        api_key=api_key or settings.api_key(),
        served_model_name=served_model_name,
        enable_adapter_loading=enable_adapter_loading,
        adapter_dir=adapter_dir,
    )


def _bytes(gb: float | None) -> int | None:
    return None if gb is None else int(gb * 1e9)
