// States of jobs.

/** All, in the order of a job's life. */
export const STATES = ["queued", "starting", "running", "cancelling", "done", "failed", "cancelled", "incomplete"];

/** Those of jobs that are not over. */
export const ACTIVE = new Set(["queued", "starting", "running", "cancelling"]);
