"""``medseg-trt serve``: a server for HTTP and DICOM."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.infer import BACKEND_HELP
from medseg_trt.commands.options import FILE, FOLDER, output_options, print_json, print_text, verify_option
from medseg_trt.errors import UsageError
from medseg_trt.progress import LOG
from medseg_trt.spec import SLICES_PER_BATCH

if TYPE_CHECKING:
    from medseg_trt.serve.run import Running

DICOM_OPTIONS = (
    "dicom_host",
    "ae_title",
    "allow_ae",
    "send_to",
    "dicom_model",
    "dicom_output",
    "secondary_capture",
    "quiet_s",
    "retry_s",
)
SPOOL = Path.home() / ".local" / "state" / "medseg-trt" / "serve"


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt serve --bundle model.medseg",
        "medseg-trt serve --bundle organs.medseg --bundle cells.medseg --port 9000",
        "medseg-trt serve --bundle model.medseg --host 0.0.0.0 --token-file token",
        "medseg-trt serve --dicom-port 11112 --send-to ARCHIVE@10.0.0.5:104",
    ),
)
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=FOLDER,
    help="A bundle to serve; repeatable.  [default: the *.medseg here]",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="HTTP port; 0: a free one."
)
@click.option("--token-file", type=FILE, help="A file with the bearer token that every request must carry.")
@click.option("--tls-certificate", type=FILE, help="A certificate chain (PEM): serve HTTPS.")
@click.option("--tls-key", type=FILE, help="Its private key (PEM).")
@click.option("--insecure", is_flag=True, help="Serve other machines without a token.")
@click.option(
    "--spool", type=FOLDER, default=SPOOL, help="Folder of accepted work.  [default: ~/.local/state/medseg-trt/serve]"
)
@click.option("--backend", default="auto", show_default=True, help=BACKEND_HELP)
@click.option("--precision", help="One of the bundles' precisions.  [default: the fastest]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
@click.option(
    "--streams",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Runs of a bundle that may overlap, each with a copy of its weights in memory; at most one a CPU thread.",
)
@click.option(
    "--max-batch", type=click.IntRange(1, 64), default=SLICES_PER_BATCH, show_default=True, help="Slices per run."
)
@click.option("--max-requests", type=click.IntRange(1), default=64, show_default=True, help="Open requests per bundle.")
@click.option("--max-body-mb", type=click.IntRange(1), default=1024, show_default=True, help="Largest upload in MiB.")
@click.option(
    "--keep-s", type=click.FloatRange(0), default=3600, show_default=True, help="Seconds that results are kept."
)
@click.option("--dicom-port", type=click.IntRange(0, 65535), help="Also be a DICOM node on this port; 0: a free one.")
@click.option("--dicom-host", default="127.0.0.1", show_default=True, help="The address of the DICOM node.")
@click.option("--ae-title", default="MEDSEG", show_default=True, help="AE title of the DICOM node.")
@click.option("--allow-ae", help="Calling AE titles that may send, with commas.  [default: all]")
@click.option("--send-to", multiple=True, help="AET@host:port or http://host/dicom-web that gets results; repeatable.")
@click.option("--dicom-model", help="The bundle that segments DICOM series.  [default: the only one]")
@click.option("--dicom-output", type=FOLDER, help="A folder that also gets the DICOM segmentations.")
@click.option("--secondary-capture", is_flag=True, help="Also send the overlay as Secondary Capture.")
@click.option(
    "--quiet-s", type=click.FloatRange(0), default=10, show_default=True, help="A series is complete after it."
)
@click.option(
    "--retry-s", type=click.FloatRange(0.1), default=5, show_default=True, help="First pause after a failed send."
)
@verify_option
@output_options
def serve(as_json: bool, **options: Any) -> None:
    """Serve bundles over HTTP and DICOM.

    HTTP: the Open Inference Protocol below /v2, masks of uploaded images at /v1/segment, a page at /, metrics at
    /metrics. DICOM: series that arrive are segmented and sent on as DICOM segmentations. SIGTERM finishes what is in
    flight.
    """
    from medseg_trt.errors import require
    from medseg_trt.serve.json_log import log_as_json
    from medseg_trt.serve.settings import EXTRA

    for module in ("starlette", "uvicorn", "prometheus_client", "pynetdicom", "highdicom"):
        require(module, EXTRA)
    from medseg_trt.serve.run import serve as run

    settings = _settings(options)
    log_as_json(LOG)

    def ready(running: "Running") -> None:
        names = ", ".join(f"{name} {version}" for name, version in running.models.items())
        if as_json:
            print_json({"address": running.address, "dicom_port": running.dicom_port, "models": running.models})
            return
        print_text(f"serving {names} at {running.address}")
        if running.dicom_port is not None:
            print_text(f"DICOM node {options['ae_title']} on {options['dicom_host']}:{running.dicom_port}")

    run(settings, ready)


def _refuse_dicom_options() -> None:
    context = click.get_current_context()
    for name in DICOM_OPTIONS:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise UsageError(f"--{name.replace('_', '-')} needs a DICOM node; add --dicom-port, for example 11112")


def _settings(options: dict[str, Any]) -> Any:
    from medseg_trt.bundles.bundle import find_bundle
    from medseg_trt.serve.settings import (
        DicomSettings,
        Limits,
        ServeSettings,
        parse_ae_title,
        parse_destination,
        read_token,
    )

    dicom = None
    if options["dicom_port"] is None:
        _refuse_dicom_options()
    else:
        allowed = [title for title in (options["allow_ae"] or "").split(",") if title.strip()]
        dicom = DicomSettings(
            port=options["dicom_port"],
            host=options["dicom_host"],
            ae_title=parse_ae_title(options["ae_title"]),
            allowed=tuple(map(parse_ae_title, allowed)),
            send_to=tuple(map(parse_destination, options["send_to"])),
            output=options["dicom_output"],
            model=options["dicom_model"],
            secondary_capture=options["secondary_capture"],
            quiet_s=options["quiet_s"],
            released_s=min(1.0, options["quiet_s"]),
            retry_s=options["retry_s"],
        )
    return ServeSettings(
        bundles=tuple(options["bundles"]) or (find_bundle(None),),
        spool=options["spool"],
        host=options["host"],
        port=options["port"],
        backend=options["backend"],
        precision=options["precision"],
        threads=options["threads"],
        streams=options["streams"],
        verify_key=options["verify_key"],
        token=read_token(options["token_file"]) if options["token_file"] is not None else None,
        insecure=options["insecure"],
        tls_certificate=options["tls_certificate"],
        tls_key=options["tls_key"],
        dicom=dicom,
        limits=Limits(
            max_batch=options["max_batch"],
            max_requests=options["max_requests"],
            max_body_bytes=options["max_body_mb"] << 20,
            keep_s=options["keep_s"],
        ),
    )
