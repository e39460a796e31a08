"""The commands. Bad requests end with exit code 2, failed runs with 1, each with one sentence on standard error."""

from __future__ import annotations

import contextlib
import csv
import io
import secrets
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO, cast

import typer

from equigram import __version__, commands, serving
from equigram.errors import EquigramError, IncompleteRunError, SpecError, StoreError
from equigram.terminal import command, err, out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equigram.events import Listener
    from equigram.plan import Plan
    from equigram.solve.stage import Result
    from equigram.spec import JobSpec, KernelName
    from equigram.store import GramStore

app = typer.Typer(
    name="equigram",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Gram matrices of infinitely wide equivariant networks, tile by tile, and predictions with them.

A job is a YAML file; `equigram run JOB.yaml` does everything it asks for, and started again after any
interruption goes on where it stopped. The smallest job:

    store: runs/mine
    data: {train: path/to/class-folders, test_fraction: 0.2}

`equigram run --help` shows a whole one.

Exit codes: 0 done, 1 the run failed (finished tiles are kept), 2 a wrong request, 3 cancelled or incomplete, 4 no
service answers or it refuses the token, 130 interrupted, 143 terminated.""",
)

JobArgument = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
AddressOption = Annotated[
    str | None,
    typer.Option(help="Ray cluster, host:port, ray://host:port or auto; instead of resources.address.", metavar="RAY"),
]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="The run store: a folder or any fsspec URL.")]


def _load(job: Path, address: str | None) -> JobSpec:
    """The job in a file, on the cluster at ``address`` if one is given."""
    from equigram.spec import JobSpec

    return _on_cluster(JobSpec.load(job), address)


def _on_cluster(spec: JobSpec, address: str | None) -> JobSpec:
    """The same job on the cluster at ``address``, if one is given."""
    if address is None:
        return spec
    fields = spec.model_dump(mode="json")
    return type(spec).parse({**fields, "resources": {**fields["resources"], "address": address}}, source="--address")


@command(app)
def run(
    job: JobArgument,
    address: AddressOption = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append what happens to a file, a line of JSON for each event.")
    ] = None,
    metrics: Annotated[
        int | None,
        typer.Option(min=1, max=65535, metavar="PORT", help="Serve metrics for Prometheus on this port of localhost."),
    ] = None,
) -> None:
    """Run a job: images, Gram matrices, predictions. Run again, it goes on from what is stored.

    Finished tiles are kept whatever happens: a power cut, a full disk, a killed worker. The store accepts only the
    job it was made for. A whole job, of which only `store` and `data.train` are required:

        store: runs/histology              # where the run lives: folder or URL
        data:
          train: /data/NCT-CRC-HE-100K     # class folders, .npz, .npy or zarr
          test: /data/CRC-VAL-HE-7K        # or test_fraction: 0.2
          size: 32                         # resize to 32x32, anti-aliased
          normalize: per_channel           # or none
          per_class: 100                   # training images of each class
          seed: 0                          # of every random choice
        network: {depth: 3, filter_size: 3, padding: SAME, activation: relu,
                  w_std: 1.4142, b_std: 0.0, head: []}
        gram: {groups: [C1, C4], kernels: [nngp, ntk], dtype: float32,
               tile: auto, engine: auto}
        resources: {workers: auto, cpus_per_worker: 1, gpus_per_worker: 0}
        solve: {ridge: [1e-4, 1e-2], choose: auto, kernels: [nngp, ntk],
                train_sizes: [10, 30], method: auto}
        storage_options: null              # {s3: {endpoint_url: ...}}

    Predictions are `mean(Y) + K(x, X) (K(X, X) + ridge s I)^-1 (Y - mean(Y))`, with one-hot or real targets Y and s the
    mean diagonal of K(X, X).

    Relative paths start in the current folder. docs/job.md has all fields, with meaning, default and allowed values.
    """
    from equigram.screen import Screen

    spec = _load(job, address)  # before the slow imports, so that a typo shows at once
    from equigram.events import tell
    from equigram.listeners import EventLog, Metrics
    from equigram.run import run as run_job

    with contextlib.ExitStack() as stack:
        listeners: list[Listener] = [stack.enter_context(EventLog(log))] if log else []
        listeners += [stack.enter_context(Metrics(metrics))] if metrics else []
        finished = run_job(spec, tell(*listeners, stack.enter_context(Screen(err))))
    info = finished.store.info
    out.print(
        f"{spec.store}: {info.train:,} training and {info.test:,} test images, {len(info.tiling):,} tiles, all done",
        soft_wrap=True,
    )
    if finished.results:
        _print_results(finished.results, spec.gram.dtype)
        store = shlex.quote(spec.store)
        out.print(f"next: equigram plot {store}", soft_wrap=True)
        out.print(f"      equigram predict {store} IMAGES", soft_wrap=True)


@command(app)
def plan(
    job: JobArgument,
    address: AddressOption = None,
    price: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="NUMBER", help="Price of 1,000 GPU-hours, or CPU-hours for workers without GPUs."
        ),
    ] = None,
) -> None:
    """Show what a job will cost before anything starts: tiles, pairs, bytes, memory, time.

    Images, network, memory and disk are checked as `run` would check them. The time is predicted from the cost of a
    pair, which is measured on this machine. If the store exists already, only what is missing counts. Nothing is
    written.
    """
    from equigram.screen import Screen

    spec = _load(job, address)
    from equigram.driver import check_address
    from equigram.run import check_disk, check_solver, look_at_images, make_plan, open_store, stored_survey
    from equigram.storage import configure
    from equigram.store import GramStore

    configure(spec.storage_options)
    check_address(spec.resources)
    with Screen(err) as screen:
        store = open_store(spec, screen) if GramStore.exists(spec.store) else None
        if store is None:
            found = look_at_images(spec, screen)
        else:
            found = stored_survey(store)
            check_solver(spec, found, store.info.tile)
        result = make_plan(spec, found, store, screen)
    _print_plan(spec, result, (found.height, found.width, found.channels), price, begun=store is not None)
    if store is None:
        check_disk(spec, result)


@command(app)
def status(store: StoreArgument) -> None:
    """Show what a store holds: its job, the tiles done and missing, and the results."""
    from equigram.screen import summary, tile_map
    from equigram.solve.stage import solved_matrices, stored_results
    from equigram.store import GramStore

    opened = GramStore.open(store)
    info = opened.info
    tiling, done = info.tiling, opened.finished_tiles()
    passes = [done] if len(info.passes) == 1 else [part.finished_tiles() for _, part in opened.passes()]
    tiles, finished, pairs = len(passes) * len(tiling), sum(map(len, passes)), sum(one.pairs for one in passes)
    missing, total = tiles - finished, len(passes) * tiling.total_pairs
    times = f" in {len(passes)} passes" if len(passes) > 1 else ""
    _print_facts(
        ("store", store),
        ("created", f"{info.created}, equigram {info.versions.get('equigram', '?')}"),
        ("computed", f"on {', '.join(info.processors)}" if info.processors else "nothing yet"),
        ("images", f"{info.train:,} training, {info.test:,} test, {'x'.join(map(str, info.image_shape))}"),
        ("networks", _networks(info.spec)),
        ("tiles", f"{finished:,} of {tiles:,} done{times}, {missing:,} missing"),
        ("pairs", f"{pairs:,} of {total:,} ({pairs / total:.1%})"),
        ("history", summary(opened.history())),
    )
    if missing:
        out.print("\ntrain x train, # done, + partly, . missing")
        out.print(tile_map(tiling, done, "gram"))
        if tiling.test:
            out.print("\ntest x train")
            out.print(tile_map(tiling, done, "cross"))
    solved = solved_matrices(opened)
    results = [result for pair in solved for result in stored_results(opened, *pair)]
    if results:
        _print_results(results, info.spec.gram.dtype)
    if missing or (info.spec.solve is not None and not solved):
        out.print("next: equigram run JOB.yaml goes on from here")


@command(app)
def predict(
    store: StoreArgument,
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES", help="New images: a folder, an image file, an .npz, .npy or zarr; any fsspec URL."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="CSV file; by default standard output.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="GROUP", help="Network: C1, C4, …; by default the last of the job.")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(metavar="KERNEL", help="nngp or ntk; by default the last that was solved.")
    ] = None,
    ridge: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="One of the job's ridge values; by default the chosen one.")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Calibrated probabilities of the classes instead of scores.")
    ] = False,
    variances: Annotated[
        bool, typer.Option("--variances", help="One more column, the variance; factorises the train matrix in memory.")
    ] = False,
) -> None:
    """Predict new images with a finished run, and write a CSV line for each.

    Columns: the image, the predicted class, and a score per class (the regression's value: about 1 for the class, 0
    for the others); without classes a value per target. New images are treated as the training images were.
    """
    from equigram.events import Progress
    from equigram.run import predict as predict_images
    from equigram.screen import Screen
    from equigram.store import GramStore

    opened = GramStore.open(store)
    group, kernel = _choose_solution(opened, group, kernel)
    with _replaced(output) as file:
        with Screen(err) as screen:
            found = predict_images(
                opened,
                images,
                group,
                kernel,
                ridge,
                lambda done, total: screen(Progress("images", done, total)),
                calibrated=probabilities,
                variances=variances,
            )
        values = found.values if found.probabilities is None else found.probabilities
        columns = found.classes or tuple(f"target_{i}" for i in range(values.shape[1]))
        lines = csv.writer(file, lineterminator="\n")
        spread = [] if found.variances is None else ["variance"]
        lines.writerow(["image", *(["predicted"] if found.classes else []), *columns, *spread])
        for index, (name, row) in enumerate(zip(found.names, values, strict=True)):
            best = [columns[int(row.argmax())]] if found.classes else []
            more = [] if found.variances is None else [found.variances[index]]
            lines.writerow([name, *best, *(f"{value:.6g}" for value in (*row, *more))])
    if found.warning:
        err.print(f"note: {found.group} {found.kernel}: {found.warning}", soft_wrap=True)
    if output is not None:
        words = f"{len(found.names):,} predictions ({found.group} {found.kernel}, ridge {found.ridge:g}) in {output}"
        err.print(words, soft_wrap=True)


@command(app)
def plot(
    store: StoreArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the pictures.")] = Path(
        "plots"
    ),
) -> None:
    """Draw the Gram matrices sorted by class, their spectra, confusion matrices and learning curves, as PNG and SVG.

    Prints the path of each. The figures of `equigram experiment` are drawn there.
    """
    from equigram.figures import draw_run
    from equigram.store import GramStore

    for path in draw_run(GramStore.open(store), output):
        out.print(str(path), soft_wrap=True)


@command(app)
def verify(
    store: StoreArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Compute, load, solve or write again what is wrong.")
    ] = False,
    samples: Annotated[
        int, typer.Option(min=0, metavar="NUMBER", help="Tiles that are computed anew, and minors that are taken.")
    ] = 8,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="NUMBER", help="Of the choice of these; another one each time without.")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Check everything that a store holds; exit code 1 if something is wrong. Changes nothing without `--repair`.

    Reads every chunk (size, checksum, finite values, the same bits on both sides of the diagonal), computes the kernel
    of every image with itself and compares it with the diagonal, bounds every entry by Cauchy-Schwarz, takes
    eigenvalues of some principal minors, and computes an entry of every tile and all of some tiles anew: the same bits
    on the same kind of processor, else to 5e-6 (float32).
    """
    from equigram.driver import check_address
    from equigram.run import mend
    from equigram.screen import Screen
    from equigram.store import GramStore
    from equigram.verify import verify as verify_store

    opened = GramStore.open(store)
    seed = secrets.randbelow(2**32) if seed is None else seed
    with Screen(err) as screen:
        report = verify_store(opened, screen, samples, seed)
    for finding in report.findings:
        out.print(f"wrong: {finding.what}", soft_wrap=True)
    how = "the same bits" if report.to_the_bit else "agreeing to rounding"
    _print_facts(
        ("chunks", f"{report.chunks:,} read"),
        ("diagonal", f"{report.images:,} images computed with themselves, {how} required"),
        ("minors", f"{report.minors:,} sampled"),
        ("anew", f"{report.anew:,} tiles computed, {how} required; --seed {seed}"),
        ("missing", _some(report.missing, "tile")),
        ("wrong", _some(len(report.findings), "thing") if report.findings else "nothing"),
    )
    if not report.findings:
        if report.missing:
            out.print("next: equigram run JOB.yaml computes what is missing")
        return
    if repair:
        spec = _on_cluster(opened.info.spec, address)
        check_address(spec.resources)
        with Screen(err) as screen:
            done = mend(opened, spec, report, screen)
        if report.bad_arrays or report.bad_data:
            then = "`equigram verify` looks at the rest now"
        else:
            then = "`equigram run JOB.yaml` goes on from here"
        out.print(f"{'; '.join(done) or 'nothing could be mended'}; {then}", soft_wrap=True)
        if not report.beyond:
            return
    remedy = (
        "make the store again" if report.beyond else f"mend it with `equigram verify {shlex.quote(store)} --repair`"
    )
    count = len(report.findings)
    raise StoreError(f"{store}: {count:,} {'thing is' if count == 1 else 'things are'} wrong; {remedy}")


def _some(count: int, what: str) -> str:
    """A number of things."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


@command(app)
def extend(
    store: StoreArgument,
    data: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="More images, in the forms that data.train takes.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="LABELS", help="Labels of an array without any, as data.train_labels.")
    ] = None,
    test: Annotated[bool, typer.Option("--test", help="They are test images, not training images.")] = False,
    groups: Annotated[
        list[str] | None, typer.Option("--group", metavar="GROUP", help="One more group, C8, D4, …; again for more.")
    ] = None,
    kernels: Annotated[
        list[str] | None, typer.Option("--kernel", metavar="KERNEL", help="One more kernel, nngp or ntk.")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Add images, groups or kernels to a run, compute what that needs, and solve anew.

    Images are treated as those that are there, with the same normalisation. What is finished keeps its bits: only tiles
    with new images are computed, those of the last block if it was not full, and those of new groups and kernels.
    Name the new groups and kernels in the job file too before you run it again.
    """
    from equigram.driver import check_address
    from equigram.run import extend as extend_run
    from equigram.run import extend_matrices, finish
    from equigram.screen import Screen
    from equigram.store import GramStore

    if data is None and not groups and not kernels:
        raise SpecError("nothing to add; name images (--data), groups (--group) or kernels (--kernel)")
    if data is None and (test or labels):
        raise SpecError(f"{'--test' if test else '--labels'} is about images, and none are named; add --data IMAGES")
    opened = GramStore.open(store)
    spec = _on_cluster(opened.info.spec, address)
    check_address(spec.resources)
    with Screen(err) as screen:
        if groups or kernels:
            spec = extend_matrices(opened, spec, groups or (), cast("list[KernelName]", kernels or []))
        if data is not None:
            extend_run(opened, spec, "test" if test else "train", data, labels, screen)
        finished = finish(opened, spec, screen)
    info = opened.info
    out.print(f"{store}: {info.train:,} training and {info.test:,} test images, all tiles done", soft_wrap=True)
    if finished.results:
        _print_results(finished.results, spec.gram.dtype)


@command(app)
def export(
    store: StoreArgument,
    output: Annotated[str, typer.Argument(metavar="OUT", help="A new .npz file, or a new .zarr: a folder or any URL.")],
    groups: Annotated[
        list[str] | None, typer.Option("--group", metavar="GROUP", help="C1, C4, …; again for more; by default all.")
    ] = None,
    kernels: Annotated[
        list[str] | None,
        typer.Option("--kernel", metavar="KERNEL", help="nngp or ntk; by default all that are stored."),
    ] = None,
    train: Annotated[
        str | None, typer.Option(metavar="FIRST:END", help="Training images, as 0:1000; by default all.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(metavar="FIRST:END", help="Test images, as 0:100, or 0:0 for none; by default all.")
    ] = None,
) -> None:
    """Copy Gram matrices, labels and names out of a store, all of them or some, into one file or another zarr.

    The arrays have the names that they have in the store: `gram/<group>/<kernel>` (n, n), `cross/<group>/<kernel>`
    (m, n), `labels/train`, `labels/test`; and `names/train`, `names/test`, in zarr a line each as UTF-8 bytes.
    """
    from equigram.events import Progress
    from equigram.export import export_run
    from equigram.screen import Screen
    from equigram.store import GramStore

    opened = GramStore.open(store)
    with Screen(err) as screen:
        names = export_run(
            opened,
            output,
            groups,
            kernels,
            train,
            test,
            lambda done, total: screen(Progress("matrices", done, total)),
        )
    out.print(f"{output}: {', '.join(names)}", soft_wrap=True)


@command(app)
def import_(
    job: JobArgument,
    source: Annotated[str, typer.Argument(metavar="MATRICES", help="An .npz file or a zarr, as `export` writes them.")],
    samples: Annotated[
        int, typer.Option(min=0, metavar="NUMBER", help="Tiles that are computed here for comparison.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, metavar="NUMBER", help="Of the choice of these.")] = 0,
) -> None:
    """Fill the store of a job with Gram matrices that were computed elsewhere.

    MATRICES holds `gram/<group>/<kernel>` (n, n) and `cross/<group>/<kernel>` (m, n) for the images of the job in their
    order in the store, NaN where a value is missing. Taken are tiles that are missing in the store, and complete there
    in the matrices of all groups and kernels that are computed together, after some of them were computed here and
    found equal up to rounding; `equigram run` computes the rest.
    """
    from equigram.importing import check_source, import_matrices
    from equigram.run import prepare
    from equigram.screen import Screen
    from equigram.storage import configure

    spec = _load(job, None)
    configure(spec.storage_options)
    check_source(source)  # before a store is made
    with Screen(err) as screen:
        store, _ = prepare(spec, screen)
        taken = import_matrices(store, source, screen, samples, seed)
    missing = sum(len(store.info.tiling) - len(part.finished_tiles()) for _, part in store.passes())
    why = f": they are not in all matrices of {source}, or not whole or not finite there" if missing else ""
    out.print(f"{spec.store}: {_some(taken, 'tile')} imported, {missing:,} missing{why}", soft_wrap=True)
    out.print(f"next: equigram run {shlex.quote(str(job))}", soft_wrap=True)


app.add_typer(commands.app)
app.add_typer(serving.app)

experiments = typer.Typer(
    no_args_is_help=True, help="Experiments of the theory; each writes data, a table and a figure."
)
app.add_typer(experiments, name="experiment")

OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where data, table and figure go.", show_default=False)
]


@command(experiments)
def convergence(
    output: OutputOption,
    groups: Annotated[
        list[str] | None, typer.Option("--group", metavar="GROUP", help="C1, C2, C4, C8, …; again for more.")
    ] = None,
    widths: Annotated[
        list[int] | None, typer.Option("--width", min=1, metavar="NUMBER", help="By default 1, 2, 4, … to 512.")
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=2, metavar="NUMBER", help="Networks of each group at the largest width; at others up to 64 times more."
        ),
    ] = 100,
    depth: Annotated[int, typer.Option(min=1, metavar="NUMBER", help="Convolutions.")] = 3,
    images: Annotated[int, typer.Option(min=1, metavar="NUMBER", help="Random images to compare on.")] = 3,
    size: Annotated[int, typer.Option(min=1, metavar="NUMBER", help="Pixels along their sides.")] = 4,
    activation: Annotated[str, typer.Option(metavar="NAME", help="erf, relu, …")] = "erf",
    w_std: Annotated[float, typer.Option(metavar="NUMBER", help="Standard deviation of the weights.")] = 1.5,
    seed: Annotated[int, typer.Option(min=0, metavar="NUMBER", help="Of images and networks.")] = 0,
) -> None:
    """Sample networks of finite width, and compare their mean NNGP and NTK with the limit.

    The relative error, averaged over all entries of the Gram matrix, falls like 1/width (the bias of finite width) or
    1/sqrt(networks * width) (the spread of the mean); both are fitted. Run again, it goes on; with more `--samples` it
    adds to those that are there.
    """
    from equigram.experiments.convergence import Convergence, run_convergence
    from equigram.screen import Screen

    default = Convergence()
    spec = Convergence(
        groups=tuple(groups or default.groups),
        widths=tuple(widths or default.widths),
        samples=samples,
        depth=depth,
        images=images,
        size=size,
        activation=activation,
        w_std=w_std,
        seed=seed,
    )
    with Screen(err) as screen:
        rows = run_convergence(spec, output, screen)
    for row in rows:
        if row["width"] == max(spec.widths):
            out.print(
                f"{row['group']} {row['kernel']}: relative error {row['relative_error']:.2%} ± "
                f"{row['standard_error']:.2%} at width {row['width']}, bias "
                f"{row['fitted_bias_times_width']:.2f}/width, spread "
                f"{row['fitted_spread_times_root_width']:.2f}/√(m width)",
                soft_wrap=True,
            )
    out.print(f"{output / 'convergence.csv'}, convergence.png, convergence.svg", soft_wrap=True)


@command(experiments)
def dynamics(
    store: StoreArgument,
    output: OutputOption,
    kernels: Annotated[
        list[str] | None, typer.Option("--kernel", metavar="KERNEL", help="ntk, nngp; again for more; by default ntk.")
    ] = None,
) -> None:
    """Spectrum of the matrices of a run, and what gradient flow learns when.

    Eigenvalues, the share of the targets along each eigenvector, the time at which it is learned, and the predicted
    errors on training and test images over time.
    """
    from equigram.experiments.dynamics import run_dynamics
    from equigram.screen import Screen
    from equigram.store import GramStore

    opened = GramStore.open(store)
    chosen = kernels or ["ntk"]
    for kernel in chosen:
        if kernel not in opened.info.spec.gram.kernels:
            stored = ", ".join(opened.info.spec.gram.kernels)
            raise SpecError(f"--kernel {kernel!r} is not in {store}; it holds {stored}")
    with Screen(err) as screen:
        run_dynamics(opened, output, screen, cast("list[KernelName]", chosen))
    out.print(f"{output / 'spectrum.csv'}, dynamics.csv, dynamics.png, dynamics.svg", soft_wrap=True)


@command(experiments)
def curves(
    store: StoreArgument,
    output: OutputOption,
    sizes: Annotated[
        list[int] | None,
        typer.Option("--size", min=1, metavar="NUMBER", help="Training images per class; again for more."),
    ] = None,
    subsets: Annotated[int, typer.Option(min=1, metavar="NUMBER", help="Random subsets of each size.")] = 5,
    seed: Annotated[int, typer.Option(min=0, metavar="NUMBER", help="Of the subsets.")] = 0,
) -> None:
    """Learning curves of a run: test accuracy for random subsets of its training images, from its one Gram matrix.

    Nothing is computed again. The subsets are the same for all groups and kernels; the ridge is chosen on training
    images that are left out.
    """
    import numpy as np

    from equigram.experiments.curves import run_curves
    from equigram.screen import Screen
    from equigram.store import GramStore

    with Screen(err) as screen:
        rows = run_curves(GramStore.open(store), output, screen, sizes, subsets, seed)
    out.print("accuracy: mean ± standard deviation over the subsets")
    for group, kernel, images in dict.fromkeys((row["group"], row["kernel"], row["images"]) for row in rows):
        scores = [
            row["accuracy"] for row in rows if (row["group"], row["kernel"], row["images"]) == (group, kernel, images)
        ]
        spread = f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
        out.print(f"{group} {kernel}, {images:,} images: {np.mean(scores):.3f}{spread}")
    out.print(f"{output / 'curves.csv'}, curves.png, curves.svg", soft_wrap=True)


@command(experiments)
def augmentation(
    store: StoreArgument,
    output: OutputOption,
    groups: Annotated[
        list[str] | None, typer.Option("--group", metavar="GROUP", help="C2, C4, D4; again for more; by default these.")
    ] = None,
    images: Annotated[int, typer.Option(min=2, metavar="NUMBER", help="Training images of the run to take.")] = 40,
) -> None:
    """Augmentation equals symmetry: training on all turned images, against the group-averaged kernel.

    With images and labels of a run. The predictions of a plain CNN kernel on all |G| positions of the images with a
    ridge are those of the averaged kernel on the images alone with that ridge divided by |G|.
    """
    from equigram.experiments.augmentation import run_augmentation
    from equigram.screen import Screen
    from equigram.store import GramStore

    with Screen(err) as screen:
        rows = run_augmentation(GramStore.open(store), output, screen, groups or ("C2", "C4", "D4"), images)
    for row in rows:
        out.print(
            f"{row['group']} {row['kernel']}, ridge {row['ridge_augmented']:.2e} on {row['elements']} x "
            f"{row['images']} images, {row['ridge_averaged']:.2e} averaged: predictions up to "
            f"{row['largest_prediction']:.3f} differ by {row['largest_difference']:.0e}",
            soft_wrap=True,
        )
    out.print(f"{output / 'augmentation.csv'}, predictions.csv, augmentation.png, augmentation.svg", soft_wrap=True)


@command(experiments)
def trainability(
    output: OutputOption,
    groups: Annotated[
        list[str] | None, typer.Option("--group", metavar="GROUP", help="Again for more; by default C1 and C4.")
    ] = None,
    depths: Annotated[
        list[int] | None, typer.Option("--depth", min=1, metavar="NUMBER", help="By default 2, 4, 8, 16, 32.")
    ] = None,
    activation: Annotated[str, typer.Option(metavar="NAME", help="erf, relu, …")] = "erf",
) -> None:
    """Condition of the NTK against depth and the variances of weights and biases, with the phase boundary.

    Run again, it goes on.
    """
    from equigram.experiments.trainability import Trainability, run_trainability
    from equigram.screen import Screen

    default = Trainability()
    spec = Trainability(
        groups=tuple(groups or default.groups), depths=tuple(depths or default.depths), activation=activation
    )
    with Screen(err) as screen:
        run_trainability(spec, output, screen)
    out.print(f"{output / 'trainability.csv'}, trainability.png, trainability.svg", soft_wrap=True)


def _version(show: bool) -> None:
    if show:
        out.print(f"equigram {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    # File names may hold what the encoding of a stream cannot express; that must not end a command.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app()


def _choose_solution(store: GramStore, group: str | None, kernel: str | None) -> tuple[str, str]:
    """The solution to predict with: the one asked for, or the last."""
    from equigram.solve.stage import solved_matrices
    from equikernel.errors import either, suggestion

    solved = solved_matrices(store)
    if not solved:
        total = len(store.info.tiling)
        missing = total - len(store.finished_tiles())
        reason = (
            f"{missing:,} of {total:,} tiles are missing; `equigram run JOB.yaml` computes them"
            if missing
            else "it is not solved as its last job asks for; run that with a `solve` section"
        )
        raise IncompleteRunError(f"{store.url} has nothing to predict with: {reason}")
    for option, asked, choices in (
        ("--group", group, [g for g, _ in solved]),
        ("--kernel", kernel, [k for g, k in solved if group in (None, g)]),
    ):
        if asked is not None and asked not in choices:
            raise SpecError(
                f"{option} {asked!r} is not solved in {store.url}; choose {either(dict.fromkeys(choices))}"
                + suggestion(asked, choices)
            )
    return next((g, k) for g, k in reversed(solved) if group in (None, g) and kernel in (None, k))


@contextlib.contextmanager
def _replaced(path: Path | None) -> Iterator[TextIO]:
    """A text file that takes the place of ``path`` when it is complete; standard output for ``None``.

    Raises:
      SpecError: there cannot be a file of that name.
      StoreError: it cannot be written.
    """
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield sys.stdout
        return
    folder = path.absolute().parent
    if path.is_dir():
        raise SpecError(f"{path} is a folder; name a file for the predictions")
    if not folder.is_dir():
        raise SpecError(f"{path}: there is no folder {folder}; create it first")
    # A pipe or device keeps its place; behind a link, the file is replaced and not the link.
    special = path.exists() and not path.is_file()
    target = path.resolve()
    partial = path if special else target.with_name(f".{target.name}.part")
    try:
        with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield file
        if not special:
            partial.replace(target)
    except EquigramError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot write the predictions: {error.strerror}") from None
    finally:
        if not special:
            partial.unlink(missing_ok=True)


def _networks(spec: JobSpec) -> str:
    return f"{' '.join(spec.gram.groups)} · {' '.join(spec.gram.kernels)} · {spec.gram.dtype}"


def _print_facts(*facts: tuple[str, str]) -> None:
    width = max(len(name) for name, _ in facts)
    for name, text in facts:
        out.print(f"{name:<{width}}  {text}", soft_wrap=True)


def _print_plan(
    spec: JobSpec, plan: Plan, image_shape: tuple[int, int, int], price: float | None, *, begun: bool
) -> None:
    from equigram.screen import duration
    from equikernel.memory import available_memory, format_bytes

    tiling, resources = plan.tiling, spec.resources
    where = "this machine" if resources.address is None else "the cluster"
    each = f"each {resources.cpus_per_worker} CPU, {resources.gpus_per_worker:g} GPU, {format_bytes(plan.worker_bytes)}"
    test = f" and {plan.matrices} of {tiling.test:,} x {tiling.train:,}" if tiling.test else ""
    missing = f": {plan.missing:,} missing" if begun else ""
    times = f", in each of {len(plan.costs)} passes" if len(plan.costs) > 1 else ""
    cores = resources.cpus_per_worker
    cost = []
    if price is not None:
        gpus = resources.gpus_per_worker
        kind, units = ("GPU", gpus) if gpus else ("CPU", float(cores))
        hours = plan.work * units / 3600
        cost = [("cost", f"{hours * price / 1000:,.2f} for {hours:,.3g} {kind}-hours at {price:,g} per 1,000")]
    why = "as resources.workers = 0 says" if resources.workers == 0 else "which is faster than a cluster starts"
    costs = " + ".join(f"{cost * 1e3:.3g}" for cost in plan.costs.values())
    _print_facts(
        ("store", f"{spec.store} ({'begun' if begun else 'new'}), {format_bytes(plan.store_bytes)} when finished"),
        ("images", f"{tiling.train:,} training, {tiling.test:,} test, {'x'.join(map(str, image_shape))}"),
        ("networks", _networks(spec)),
        ("engine", ", ".join(dict.fromkeys(spec.engine_for(one.groups) for one in plan.costs))),
        ("matrices", f"{plan.matrices} of {tiling.train:,} x {tiling.train:,}{test}"),
        ("tiles", f"{len(tiling):,} of {tiling.edge} x {tiling.edge} images{times}{missing}"),
        ("pairs", f"{tiling.total_pairs:,}{times}{f': {plan.missing_pairs:,} missing' if begun else ''}"),
        (
            "workers",
            f"{plan.workers:,}, {each}" if plan.workers else f"none: this process, {why}",
        ),
        (
            "to solve",
            f"{format_bytes(plan.solver_bytes)} of memory; here are {format_bytes(available_memory())} available"
            if spec.solve
            else "nothing",
        ),
        ("a pair", f"{costs} ms on one worker, measured on {where}"),
        ("time", f"about {duration(max(plan.seconds, 0.1))}" if plan.missing else "nothing is left to compute"),
        *cost,
    )


def _print_results(results: Sequence[Result], dtype: str) -> None:
    from equigram.screen import comparison, results_table, warnings

    out.print(results_table(results))
    for warning in warnings(results, dtype):
        out.print(warning)
    compared = comparison(results)
    if compared is not None:
        out.print(compared)


if __name__ == "__main__":
    main()
