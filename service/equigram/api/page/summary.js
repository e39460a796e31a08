// What there is to say of a job in words and numbers.

import { jobPath, request } from "./api.js";
import { byId, element, setState, setText, shown } from "./dom.js";
import { NOTHING, compact, count, dateTime, duration, percent, plural, secondsBetween, yaml } from "./format.js";

/** The title of the job, how far it is, and what a person should know. */
export function summaryPanel() {
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
      if (notes.textContent !== job.notes.join("")) {
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

/** The workers of the present driver. */
export function workersPanel() {
  const row = (worker, running) =>
    element(
      "tr",
      { "data-testid": "worker-row", class: worker.lost ? "lost" : null },
      element("td", { class: "number" }, String(worker.number)),
      element("td", {}, worker.place),
      element("td", {}, worker.processor),
      element("td", { class: "number" }, count(worker.tiles)),
      element("td", { class: "number" }, compact(worker.pairs)),
      element("td", {}, worker.lost ? `gone: ${worker.lost}` : running ? "at work" : ""),
    );
  return {
    update(job) {
      byId("worker-rows").replaceChildren(...job.workers.map((worker) => row(worker, job.state === "running")));
      byId("workers").hidden = job.workers.length === 0;
      byId("workers-empty").hidden = job.workers.length > 0;
      const lost = job.workers.filter((worker) => worker.lost).length;
      const numbers = [count(job.workers.length - lost), lost > 0 && `${count(lost)} gone`].filter(Boolean);
      setText(byId("worker-count"), job.workers.length > 0 ? numbers.join(", ") : "");
    },
  };
}

/** Ways to the panels of a long page. Buttons, because the fragment of the address says which job it is. */
export function sectionsPanel() {
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

/** The job as it was submitted, and what its driver printed, which is asked for when it is opened. */
export function specPanel(id, signal) {
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
