"""Train: check a file, say what is to be trained, once or as a sweep, see what it takes, start it, watch it, and chat
with the result.

All of it goes through the jobs API with the reader's own key. What the reader chose and made is kept in the session.
"""

from __future__ import annotations

import hashlib
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

import connection
from components import file_report, sweep_plan, sweep_watch, training_watch
from components.job_details import duration
from drawing import number
from pedro.errors import ConfigError
from sources import training as data
from sources.gateway import Access, GatewayError

if TYPE_CHECKING:
    from streamlit.runtime.uploaded_file_manager import UploadedFile

    from sources.gateway import GatewayClient

TRAIN, VALIDATION = "train_file", "validation_file"
CHECKED = "train_checked"  # in the session: of which files and backbone, and what was found
UPLOADED = "train_uploaded"  # ids of files, by gateway, key and content
ESTIMATE = "train_estimate"  # the request, and its dry run
ONCE = "train_once"  # what makes one job of a button that is pressed twice
WATCHED = "train_job"  # the job that was started or asked for
STEPS = "train_job_steps"  # a job, and the steps of its estimate
JOB = "job"  # in the URL: the one that is watched
MORE = (
    "JSONL, JSON, CSV or Parquet (gzip or zstd is fine, too), of messages, prompt and completion, Alpaca, ShareGPT or "
    "preferences."
)
KINDS = {"job": "One job", "sweep": "A sweep"}
UNITS = ("B", "kB", "MB", "GB", "TB")


def page() -> None:
    gateway, status = connection.sidebar()
    st.title("Train", anchor=False)
    able = status.answers and status.access in (Access.TENANT, Access.ADMIN)
    if not able:
        connection.missing(gateway, status, "Training", "a key (`pedro keys create TENANT --scope train` makes one)")
        return
    if asked := st.query_params.get(JOB):
        st.session_state[WATCHED] = asked
    if job_id := st.session_state.get(WATCHED):
        follow(gateway, job_id)
        return
    st.caption(
        "Rows become an adapter of your key's tenant. They are checked here; nothing is sent to the gateway before you "
        "press Estimate or Start."
    )
    try:
        names = data.backbones(gateway.models())
    except GatewayError as error:
        complain(error)
        return
    backbone = st.selectbox("Backbone", names, key="train_backbone", persist_state="session")
    left, right = st.columns(2)
    with left:
        choose_file("Training data", TRAIN, MORE)
    with right:
        choose_file("Validation data", VALIDATION, "May be left out: a tenth of the training data is kept for it.")
    file: data.DataFile | None = st.session_state.get(TRAIN)
    if file is None or backbone is None:
        return
    checked = check(file, backbone, st.session_state.get(VALIDATION))
    file_report.draw(checked, file.name)
    if not checked.usable:
        return
    st.subheader("What to train", anchor=False)
    plan = choose(backbone, checked)
    if plan is not None:
        begin(gateway, plan, file)


def choose_file(label: str, key: str, about: str) -> None:
    """An upload, which stays chosen when the reader comes back to the page."""
    st.file_uploader(label, key=f"{key}_upload", help=about, on_change=partial(_take, key))
    kept = st.session_state.get(key)
    if kept is not None and st.session_state.get(f"{key}_upload") is None:
        name, drop = st.columns([5, 1], vertical_alignment="center")
        name.caption(f"Chosen: `{kept.name}`, {size(len(kept.content))}")
        drop.button("Remove", key=f"{key}_drop", type="tertiary", on_click=st.session_state.pop, args=(key,))


def _take(key: str) -> None:
    given: UploadedFile | None = st.session_state[f"{key}_upload"]
    before: data.DataFile | None = st.session_state.pop(key, None)
    if given is None:
        return
    st.session_state[key] = data.DataFile(given.name, given.getvalue())
    named = st.session_state.get("train_adapter")
    if key == TRAIN and (not named or (before and named == data.adapter_name(before.name))):
        st.session_state["train_adapter"] = data.adapter_name(given.name)


def check(file: data.DataFile, backbone: str, validation: data.DataFile | None) -> data.Checked:
    """What was found, once for the same files and backbone."""
    of = (file, backbone, validation)
    kept = st.session_state.get(CHECKED)
    if kept is None or kept[0] != of:
        with st.spinner(f"Checking {file.name} …"):
            kept = st.session_state[CHECKED] = (of, data.check(file, backbone, validation))
    found: data.Checked = kept[1]
    return found


def choose(backbone: str, checked: data.Checked) -> data.JobRequest | None:
    """Method and hyperparameters; None for options that cannot be read, which is said."""
    one, two = st.columns(2)
    adapter = one.text_input(
        "Adapter",
        key="train_adapter",
        persist_state="session",
        max_chars=64,
        help="Its name, without the tenant. One that is there gets a new version.",
    )
    method = two.selectbox(
        "Method",
        list(data.METHODS),
        format_func=lambda name: data.METHODS.get(name, name),
        key="train_method",
        persist_state="session",
        accept_new_options=True,
        help="Any other of `pedro methods` can be typed.",
    )
    numbers = st.columns(4)
    epochs = numbers[0].number_input("Epochs", 0.01, 1000.0, 3.0, 1.0, key="train_epochs", persist_state="session")
    batch = numbers[1].number_input("Batch size", 1, 4096, 16, key="train_batch", persist_state="session")
    lr = numbers[2].number_input(
        "Learning rate", 1e-7, 10.0, 3e-3, 1e-4, format="%.2g", key="train_lr", persist_state="session"
    )
    most = numbers[3].number_input(
        "Steps at most",
        1,
        10**9,
        None,
        key="train_steps",
        persist_state="session",
        placeholder="as many as the epochs have",
    )
    with st.expander("More", icon=":material/tune:"):
        text = st.text_input(
            "Options of the method", key="train_options", persist_state="session", placeholder="r: 8, alpha: 16"
        )
        seed = st.number_input("Seed", 0, 2**31 - 1, 0, key="train_seed", persist_state="session")
        beta = None
        if checked.preferences:
            beta = st.number_input("DPO's β", 0.001, 100.0, 0.1, 0.05, key="train_beta", persist_state="session")
    if checked.preferences:
        st.caption("The rows are preferences, which are learnt by DPO: better answers against worse ones.")
    kind = st.segmented_control(
        "Train",
        list(KINDS),
        default="job",
        required=True,
        format_func=lambda name: KINDS[name],
        key="train_kind",
        persist_state="session",
    )
    sweep = None
    if kind == "sweep":
        sweep = sweep_plan.choose(method or "pedro")
        if sweep is None:
            return None
    try:
        options = data.options_of(text or "")
    except ConfigError as error:
        complain(error)
        return None
    return data.JobRequest(
        backbone=backbone,
        adapter=adapter,
        method=method or "pedro",
        options=options,
        epochs=float(epochs),
        max_steps=None if most is None else int(most),
        batch_size=int(batch),
        lr=float(lr),
        seed=int(seed),
        beta=beta,
        sweep=sweep,
    )


def begin(gateway: GatewayClient, plan: data.JobRequest, file: data.DataFile) -> None:
    """The two buttons: what it takes, and the job itself."""
    left, right, _ = st.columns([2, 2, 3])
    estimates = left.button("Estimate", icon=":material/schedule:", width="stretch")
    starts = right.button(
        "Start training" if plan.sweep is None else "Start the sweep",
        icon=":material/play_arrow:",
        type="primary",
        width="stretch",
    )
    try:
        if estimates:
            with st.spinner("Working out what it takes …"):
                body = request(gateway, plan, file)
                st.session_state[ESTIMATE] = (plan, data.estimate(gateway, body))
        elif starts:
            with st.spinner("Starting …"):
                once = st.session_state.setdefault(ONCE, uuid.uuid4().hex)
                job = data.submit(gateway, request(gateway, plan, file), once)
            of, found = st.session_state.get(ESTIMATE, (None, None))
            st.session_state[STEPS] = (job["id"], found["steps"] if found and of == plan else None)
            st.session_state[WATCHED] = job["id"]
            st.rerun()
    except GatewayError as error:
        if error.code == "file_not_found":  # it was deleted or has expired; the next press uploads it again
            st.session_state.pop(UPLOADED, None)
        complain(error)
        return
    of, found = st.session_state.get(ESTIMATE, (None, None))
    if found is not None and of == plan:
        show_estimate(found)
    elif found is not None:
        st.caption("The last estimate was for other settings.")


def request(gateway: GatewayClient, plan: data.JobRequest, file: data.DataFile) -> dict[str, Any]:
    """The job's request; files are uploaded once. Raises GatewayError."""
    ids: dict[tuple[str, str, str], str] = st.session_state.setdefault(UPLOADED, {})
    whose = hashlib.sha256(gateway.key.encode()).hexdigest()

    def uploaded(chosen: data.DataFile) -> str:
        at = (gateway.url, whose, chosen.digest)
        if at not in ids:
            ids[at] = data.upload(gateway, chosen)
        return ids[at]

    validation: data.DataFile | None = st.session_state.get(VALIDATION)
    return plan.body(uploaded(file), uploaded(validation) if validation else None)


def show_estimate(found: dict[str, Any]) -> None:
    """The dry run: time, memory, steps, parameters, and where the numbers are from."""
    columns = st.columns(4)
    tensors = sum(found["memory_bytes"].values())
    number(columns[0], "Time", f"about {duration(found['seconds'])}", "from its start to its end")
    number(columns[1], "Memory", size(tensors + found["process_bytes"]), f"each worker; {size(tensors)} of tensors")
    number(columns[2], "Steps", f"{found['steps']:,}", f"ended by {found['ends_by']}")
    share = found["trainable_parameters"] / max(1, found["backbone_parameters"])
    number(columns[3], "Trained parameters", f"{found['trainable_parameters']:,}", f"{share:.2%} of the backbone's")
    rows = ", ".join(f"{count:,} {name}" for name, count in found["rows"].items())
    st.caption(f"Rows: {rows}; {found['tokens_per_row']:.0f} tokens each. Time is {found['time_from']}.")
    if "sweep" in found:
        sweep_watch.show_estimate(found, duration(found["sweep"]["seconds_in_turn"]))
    for note in found["notes"]:
        st.caption(f":material/info: {note}")


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit in UNITS[:-1]:
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} {UNITS[-1]}"


def follow(gateway: GatewayClient, job_id: str) -> None:
    """The job that was started, or that the URL names, until its reader wants another."""
    st.query_params[JOB] = job_id
    of, steps = st.session_state.get(STEPS, ("", None))

    @st.fragment(run_every=training_watch.REFRESH_S)
    def live() -> None:
        if training_watch.watch(gateway, job_id, steps if of == job_id else None):
            with st.popover("End this job …", icon=":material/stop_circle:"):
                st.markdown("Its checkpoints stay; no version is made of it.")
                st.button("End it", type="primary", on_click=_end, args=(gateway, job_id))

    live()
    st.button("Train another", icon=":material/add:", on_click=_another)


def _end(gateway: GatewayClient, job_id: str) -> None:
    try:
        data.end(gateway, job_id)
        st.toast("It will end as soon as its workers have been told.", icon=":material/check:")
    except GatewayError as error:
        st.toast(error.message, icon=":material/error:")


def _another() -> None:
    """Back to the choices, which are as they were; what is started then is another job."""
    for kept in (WATCHED, ONCE, training_watch.EVENTS):
        st.session_state.pop(kept, None)
    st.query_params.pop(JOB, None)


def complain(error: GatewayError | ConfigError) -> None:
    """An error as the API says it."""
    st.error(error.message, icon=":material/error:")
    said = " · ".join(f"{name} `{value}`" for name, value in (("param", error.param), ("code", error.code)) if value)
    if said:
        st.caption(said)


if __name__ == "__main__":
    page()
