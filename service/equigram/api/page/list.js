// The list of jobs.

import { request } from "./api.js";
import { byId, element, repeat, setOptions, setState, setText, shown } from "./dom.js";
import { NOTHING, count, dateTime, duration, percent, plural, secondsBetween } from "./format.js";
import { ACTIVE, STATES } from "./states.js";

const PAGE = 50;
const REFRESH = 2000;

const FILTERS = [
  ["", "all"],
  [[...ACTIVE].join(), "active"],
  ...STATES.map((state) => [state, state]),
];

/** The address of a job within the page. */
const jobHash = (id) => `#/jobs/${encodeURIComponent(id)}`;

function listHash(state, offset) {
  const query = new URLSearchParams();
  if (state) query.set("state", state);
  if (offset > 0) query.set("offset", offset);
  return query.size > 0 ? `#/?${query}` : "#/";
}

/** A row of the table, which is kept and updated, so that the focus stays where it is. */
class Row {
  constructor(id) {
    this.id = id;
    this.state = element("span", { class: "state" });
    this.bar = element("progress", { max: 1, "aria-label": `Pairs of ${id}` });
    this.share = element("span", { class: "share" });
    this.link = element("a", { href: jobHash(id) }, id);
    this.remark = element("span", { class: "remark" });
    this.cells = {
      State: this.cell("State", this.state),
      Job: element("th", { role: "rowheader", scope: "row", "data-label": "Job" }, this.link, this.remark),
      Owner: this.cell("Owner"),
      Networks: this.cell("Groups, kernels"),
      Train: this.cell("Train", "", "number"),
      Test: this.cell("Test", "", "number"),
      Progress: this.cell("Progress", element("span", { class: "progress" }, this.bar, this.share)),
      Submitted: this.cell("Submitted"),
      Ran: this.cell("Ran", "", "number"),
    };
    this.node = element("tr", { role: "row", "data-testid": "job-row", "data-job": id }, ...Object.values(this.cells));
  }

  cell(label, content = "", kind = null) {
    return element("td", { role: "cell", "data-label": label, class: kind }, content);
  }

  update(job) {
    const { cells } = this;
    const { counts } = job;
    setState(this.state, job.state);
    setText(this.remark, job.error?.message ?? job.headline ?? job.progress?.stage ?? "");
    setText(cells.Owner, job.owner ?? NOTHING);
    setText(cells.Networks, `${job.groups.join(", ")} · ${job.kernels.join(", ")}`);
    setText(cells.Train, count(job.train));
    setText(cells.Test, count(job.test));
    this.bar.value = counts?.pairs ? counts.finished_pairs / counts.pairs : 0;
    setText(this.share, counts ? percent(counts.finished_pairs, counts.pairs) : NOTHING);
    setText(cells.Submitted, dateTime(job.submitted));
    setText(cells.Ran, duration(secondsBetween(job.started, job.ended)));
  }
}

function clusterText(nodes) {
  const alive = nodes.filter((node) => node.alive);
  if (alive.length === 0) return "the cluster does not answer";
  const sum = (key) => alive.reduce((total, node) => total + node[key], 0);
  const gpus = sum("gpus");
  return `${plural(alive.length, "machine")}, ${plural(sum("cpus"), "CPU")}${gpus ? `, ${plural(gpus, "GPU")}` : ""}`;
}

/** Show the jobs that the query of the address asks for, until the signal aborts. */
export function openList(query, service, signal) {
  const state = query.get("state") ?? "";
  const offset = Math.max(0, Number.parseInt(query.get("offset") ?? "0", 10) || 0);
  const rows = new Map();
  const go = (hash) => {
    location.hash = hash;
  };

  setText(byId("cluster"), clusterText(service.nodes));
  const filter = byId("state-filter");
  setOptions(filter, FILTERS);
  filter.value = state;
  filter.addEventListener("change", () => go(listHash(filter.value, 0)), { signal });
  byId("list-newer").addEventListener("click", () => go(listHash(state, Math.max(0, offset - PAGE))), { signal });
  byId("list-older").addEventListener("click", () => go(listHash(state, offset + PAGE)), { signal });

  async function refresh() {
    const wanted = new URLSearchParams({ limit: PAGE, offset });
    if (state) wanted.set("state", state);
    const response = await request(`jobs?${wanted}`, { signal });
    const jobs = await response.json();
    const total = Number(response.headers.get("X-Total-Count"));
    const shownRows = jobs.map((job) => {
      const row = rows.get(job.id) ?? new Row(job.id);
      rows.set(job.id, row);
      row.update(job);
      return row.node;
    });
    const body = byId("job-rows");
    const same = shownRows.length === body.children.length && shownRows.every((row, i) => row === body.children[i]);
    if (!same) body.replaceChildren(...shownRows);

    byId("job-table").hidden = jobs.length === 0;
    byId("list-empty").hidden = jobs.length > 0;
    setText(byId("empty-heading"), state || offset ? "No such jobs" : "No jobs yet");
    byId("list-paging").hidden = offset === 0 && total <= PAGE;
    byId("list-newer").disabled = offset === 0;
    byId("list-older").disabled = offset + jobs.length >= total;
    const range = jobs.length > 0 ? `${count(offset + 1)} to ${count(offset + jobs.length)}` : "none";
    setText(byId("list-range"), `${range} of ${count(total)}`);
  }

  repeat(() => shown(byId("list-error"), refresh), REFRESH, signal);
}
