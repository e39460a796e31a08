// A job: what there is to say of it at once, what one may do with it, and the panels, which hear of all that happens.

import { jobPath, json, request } from "./api.js";
import { announce, byId, coalesced, element, repeat, setState, setText, shown } from "./dom.js";
import { eventsPanel } from "./eventlog.js";
import { NOTHING, compact, count, dateTime, duration, percent, plural, secondsBetween, yaml } from "./format.js";
import { gramPanel } from "./gram.js";
import { predictionsPanel } from "./predictions.js";
import { resultPanels } from "./result.js";
import { follow } from "./stream.js";
import { throughputPanel } from "./throughput.js";
import { tilesPanel } from "./tilemap.js";

const REFRESH = 2000;
const ACTIVE = new Set(["queued", "starting", "running"]);
const RESUMABLE = new Set(["failed", "cancelled", "incomplete"]);

/** The title of the job, how far it is, and what a person should know. */
function summaryPanel() {
  return {
    update(job) {
      setState(byId("job-state"), job.state);
      const facts = [
        job.train !== null && plural(job.train, "training image"),
        job.test && plural(job.test, "test image"),
        job.image_shape?.join(" × "),
        job.classes && `${count(job.classes.length)} classes`,
        `groups ${job.groups.join(", ")}`,
        `kernels ${job.kernels.join(", ")}`,
        job.submitted && `submitted ${dateTime(job.submitted)}${job.owner ? ` by ${job.owner}` : ""}`,
        job.attempt > 1 && `attempt ${job.attempt}`,
        job.priority !== 0 && `priority ${job.priority}`,
        job.share !== null && `may have ${percent(job.share, 1)} of the workers`,
      ];
      setText(byId("job-facts"), facts.filter(Boolean).join(" · "));
      setText(byId("job-failure"), job.error?.message ?? "");
      byId("job-failure").hidden = job.error === null;
      const notes = byId("job-notes");
      notes.hidden = job.notes.length === 0;
      if (notes.children.length !== job.notes.length) {
        notes.replaceChildren(...job.notes.map((note) => element("li", {}, note)));
      }

      const { progress, counts } = job;
      const running = job.state === "running";
      const number = progress?.total ? `: ${count(progress.done)} of ${count(progress.total)}` : "";
      byId("stage").parentElement.hidden = progress === null;
      setText(byId("stage"), progress ? `${progress.stage}${number}` : "");
      setText(byId("stage-detail"), progress?.detail ? ` ${progress.detail}` : "");
      byId("job-progress").value = counts?.pairs ? counts.finished_pairs / counts.pairs : 0;
      setText(byId("fact-done"), counts ? percent(counts.finished_pairs, counts.pairs) : NOTHING);
      setText(byId("fact-tiles"), counts ? `${count(counts.finished)} of ${count(counts.tiles)}` : NOTHING);
      setText(byId("fact-pairs"), counts ? `${compact(counts.finished_pairs)} of ${compact(counts.pairs)}` : NOTHING);
      setText(byId("fact-rate"), running ? compact(job.pairs_per_second) : NOTHING);
      setText(byId("fact-left"), running ? duration(job.seconds_left) : NOTHING);
      setText(byId("fact-elapsed"), duration(secondsBetween(job.started, job.ended)));
      setText(byId("fact-headline"), job.headline ?? NOTHING);
    },
  };
}

function workersPanel() {
  const row = (worker) =>
    element(
      "tr",
      { "data-testid": "worker-row", class: worker.lost ? "lost" : null },
      element("td", { class: "number" }, String(worker.number)),
      element("td", {}, worker.place),
      element("td", {}, worker.processor),
      element("td", { class: "number" }, count(worker.tiles)),
      element("td", { class: "number" }, compact(worker.pairs)),
      element("td", {}, worker.lost ? `lost: ${worker.lost}` : "at work"),
    );
  return {
    update(job) {
      byId("worker-rows").replaceChildren(...job.workers.map(row));
      byId("workers").hidden = job.workers.length === 0;
      byId("workers-empty").hidden = job.workers.length > 0;
      const lost = job.workers.filter((worker) => worker.lost).length;
      const numbers = [count(job.workers.length - lost), lost > 0 && `${count(lost)} lost`].filter(Boolean);
      setText(byId("worker-count"), job.workers.length > 0 ? numbers.join(", ") : "");
    },
  };
}

/** Ways to the panels of a long page. Buttons, because the fragment of the address says which job it is. */
function sectionsPanel() {
  const links = [...document.querySelectorAll("main section.panel")].map((section) => {
    const heading = section.querySelector("h2");
    const button = element("button", { type: "button" }, heading.firstChild.textContent.trim());
    button.addEventListener("click", () => {
      heading.focus({ preventScroll: true });
      section.scrollIntoView();
    });
    return { section, button };
  });
  byId("sections").replaceChildren(...links.map(({ button }) => button));
  return {
    update: () => links.forEach(({ section, button }) => (button.hidden = section.hidden)),
  };
}

function specPanel(id, signal) {
  const details = byId("driver-log");
  details.addEventListener("toggle", () => {
    if (!details.open) return;
    shown(byId("driver-log-error"), async () => {
      const text = await (await request(jobPath(id, "/log?lines=200"), { signal })).text();
      setText(byId("driver-log-text"), text || "Nothing.");
    });
  });
  return {
    update: (job) => setText(byId("spec"), yaml(job.spec)),
  };
}

/** Cancel, resume and delete, for those whose token may. */
function actionsPanel(id, service, onChange, signal) {
  const [cancel, resume, remove] = ["cancel", "resume", "delete"].map((name) => byId(`${name}-job`));
  const dialog = byId("delete-dialog");
  byId("actions").hidden = service.scope !== "write";
  setText(byId("delete-heading"), `Delete ${id}?`);

  const act = (button, task) =>
    shown(byId("action-error"), async () => {
      button.disabled = true;
      try {
        await task();
        byId("page-heading").focus(); // a disabled button would lose it
      } finally {
        onChange(); // also enables what the new state allows
      }
    });

  cancel.addEventListener("click", () => act(cancel, () => request(jobPath(id, "/cancel"), { method: "POST", signal })));
  resume.addEventListener("click", () => act(resume, () => request(jobPath(id, "/resume"), { method: "POST", signal })));
  remove.addEventListener("click", () => dialog.showModal());
  byId("delete-keep").addEventListener("click", () => dialog.close());
  byId("delete-confirm").addEventListener("click", () => {
    dialog.close();
    shown(byId("action-error"), async () => {
      await request(jobPath(id), { method: "DELETE", signal });
      announce(`${id} was deleted`);
      location.hash = "#/";
    });
  });

  return {
    update(job) {
      cancel.disabled = !ACTIVE.has(job.state);
      resume.disabled = !RESUMABLE.has(job.state);
      remove.disabled = ACTIVE.has(job.state);
    },
  };
}

function showConnection(secondsToWait) {
  const place = byId("connection");
  const lost = secondsToWait !== null;
  if (lost && place.hidden) announce("The connection to the service is lost");
  if (!lost && !place.hidden) announce("The connection is back");
  place.hidden = !lost;
  setText(place, lost ? `Connection lost; next try in ${duration(secondsToWait)}` : "");
}

/** Show a job until the signal aborts; `onMissing` is called with a sentence where there is no such job. */
export function openJob(id, service, signal, onMissing) {
  let job = null;
  let attempt = null;

  setText(byId("page-heading"), id);
  const refresh = coalesced(() =>
    shown(byId("job-error"), async () => {
      try {
        job = await json(jobPath(id), { signal });
      } catch (error) {
        if (error.status === 404) return onMissing(error.message);
        throw error;
      }
      if (!signal.aborted) panels.forEach((panel) => panel.update?.(job));
    }),
  );
  const panels = [
    summaryPanel(),
    actionsPanel(id, service, refresh, signal),
    tilesPanel(id, signal),
    throughputPanel(id, signal),
    workersPanel(),
    eventsPanel(id, signal),
    gramPanel(id, signal),
    resultPanels(id, signal),
    predictionsPanel(id, signal),
    specPanel(id, signal),
    sectionsPanel(),
  ];

  function onMessage(kind, data, messageId) {
    if (kind === "state") {
      if (data.state === job?.state) return; // it is told again with every new connection
      if (job) announce(`${id} is now ${data.state}`);
      refresh();
    }
    const present = messageId?.split(".")[0] ?? attempt;
    if (attempt !== null && present !== attempt) panels.forEach((panel) => panel.restart?.());
    attempt = present;
    panels.forEach((panel) => panel.event?.(kind, data));
  }

  async function start() {
    await refresh();
    if (signal.aborted) return;
    repeat(() => (job === null || ACTIVE.has(job.state) ? refresh() : null), REFRESH, signal);
    await shown(byId("job-error"), () => follow(jobPath(id, "/events"), onMessage, showConnection, signal));
  }

  start();
}
