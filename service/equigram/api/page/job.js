// A job: its panels, which are told what is known of it and all that happens to it.

import { actionsPanel } from "./actions.js";
import { jobPath, json } from "./api.js";
import { announce, byId, coalesced, repeat, setText, shown } from "./dom.js";
import { eventsPanel } from "./eventlog.js";
import { duration } from "./format.js";
import { gramPanel } from "./gram.js";
import { predictionsPanel } from "./predictions.js";
import { resultPanels } from "./result.js";
import { ACTIVE } from "./states.js";
import { follow } from "./stream.js";
import { sectionsPanel, specPanel, summaryPanel, workersPanel } from "./summary.js";
import { throughputPanel } from "./throughput.js";
import { tilesPanel } from "./tilemap.js";

const REFRESH = 2000;

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

  function missing(error) {
    if (error.status !== 404) throw error;
    onMissing(error.message);
  }

  setText(byId("page-heading"), id);
  const refresh = coalesced(() =>
    shown(byId("job-error"), async () => {
      try {
        job = await json(jobPath(id), { signal });
      } catch (error) {
        return missing(error);
      }
      if (!signal.aborted) panels.forEach((panel) => panel.update?.(job));
    }),
  );
  // A panel has `update` (the job as it is now), `event` (kind and data), and `restart` (another attempt), as it needs.
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
    await shown(byId("job-error"), async () => {
      try {
        await follow(jobPath(id, "/events"), onMessage, showConnection, signal);
      } catch (error) {
        missing(error);
      }
    });
  }

  start();
}
