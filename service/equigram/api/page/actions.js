// What one may do with a job.

import { jobPath, request } from "./api.js";
import { announce, byId, setText, shown } from "./dom.js";
import { ACTIVE } from "./states.js";

const RESUMABLE = new Set(["failed", "cancelled", "incomplete"]);

/** Cancel, resume and delete, for those whose token may. */
export function actionsPanel(id, service, onChange, signal) {
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

  const post = (action) => request(jobPath(id, `/${action}`), { method: "POST", signal });
  cancel.addEventListener("click", () => act(cancel, () => post("cancel")));
  resume.addEventListener("click", () => act(resume, () => post("resume")));
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
      cancel.disabled = !ACTIVE.has(job.state) || job.state === "cancelling";
      resume.disabled = !RESUMABLE.has(job.state);
      remove.disabled = ACTIVE.has(job.state);
    },
  };
}
