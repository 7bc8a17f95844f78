"""`prosparse-pipe export`: GGUF files that every llama.cpp runs, neurons sorted hot to cold."""

from pathlib import Path

import click

from prosparse_pipe.checkpoint import resolve_run


@click.command("export", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--gguf", is_flag=True, default=True, help="Write GGUF; the only format, so the flag may be left out.")
@click.option(
    "-q",
    "--type",
    "kinds",
    multiple=True,
    help="Type of the weights, repeatable or a comma list: F32 F16 BF16 Q8_0 Q4_0 Q4_K_M Q5_K_M Q6_K IQ4_XS ..."
    "  [default: Q8_0; with --ffn-only Q6_K]",
)
@click.option("--ffn-only", is_flag=True, help="Write the FFN weights alone, for a base that everyone has.")
@click.option("--base", help="With --ffn-only: the base model's GGUF.  [default: what the run was trained from]")
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder.  [default: RUN/gguf]")
@click.option("--name", help="Name of the files and in them.  [default: BASE-SIZE-ProSparse]")
@click.option("--unsorted", is_flag=True, help="Keep the order of the neurons; needs no activation rates.")
@click.option(
    "--imatrix",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Importance matrix that llama-imatrix made from a file of this export.",
)
@click.option("-t", "--threads", type=click.IntRange(0), default=0, help="Threads of the quantizer.  [default: all]")
@click.option("-v", "--verbose", is_flag=True, help="Show the quantizer's log.")
def command(
    run: Path | None,
    gguf: bool,
    kinds: tuple[str, ...],
    ffn_only: bool,
    base: str | None,
    out: Path | None,
    name: str | None,
    unsorted: bool,
    imatrix: Path | None,
    threads: int,
    verbose: bool,
) -> None:
    """Write the sparse model RUN (default: the newest run) as GGUF.

    \b
    Stock llama.cpp, LM Studio and Ollama compute the same ReLU model from the file; the sparse backend is faster.
    The predictors, if `prosparse-pipe predictor` has trained them, go into NAME.predictor.gguf beside it.
    --ffn-only writes NAME.ffn.gguf, what a run with `--trainable ffn` changed.

    \b
    prosparse-pipe export --gguf
    prosparse-pipe export --gguf runs/NAME -q F16,Q8_0 -q Q4_K_M
    """
    from prosparse_pipe.export import export_ffn, export_gguf

    names = [part.strip() for kind in kinds for part in kind.split(",") if part.strip()]
    if ffn_only:
        if len(names) > 1 or unsorted or imatrix:
            raise click.UsageError("--ffn-only takes one --type, and neither --unsorted nor --imatrix")
        path = export_ffn(resolve_run(run), names[0] if names else "Q6_K", base, out=out, name=name)
        click.echo(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
        return
    if base is not None:
        raise click.UsageError("--base goes with --ffn-only")
    names = names or ["Q8_0"]
    exported = export_gguf(
        resolve_run(run),
        names,
        out=out,
        name=name,
        unsorted=unsorted,
        imatrix=imatrix,
        threads=threads,
        verbose=verbose,
    )
    for path in (*exported.models.values(), *([exported.sidecar] if exported.sidecar else [])):
        click.echo(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    if exported.models:
        click.echo(f"next: prosparse-pipe chat {next(iter(exported.models.values()))}", err=True)
