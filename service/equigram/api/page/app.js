// The page: which part of it is seen, who sees it, and with what token. Parts live until their signal aborts.

import { json, onUnauthorized, token } from "./api.js";
import { byId, element } from "./dom.js";
import { openJob } from "./job.js";
import { openList } from "./list.js";

let current = new AbortController();
let service = null;

/** Put a template in place of the present part, and give the signal by which the new one will end. */
function mount(template, title) {
  current.abort();
  current = new AbortController();
  byId("main").replaceChildren(byId(template).content.cloneNode(true));
  document.title = title === null ? "equigram" : `${title} · equigram`;
  return current.signal;
}

/** Where the address points to: the list is `#/?state=running&offset=50`, a job `#/jobs/its-name`. */
function parseHash() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  if (!path.startsWith("jobs/")) return { query: new URLSearchParams(query) };
  try {
    return { job: decodeURIComponent(path.slice("jobs/".length)) };
  } catch {
    return { unknown: true }; // a percent sign that encodes nothing
  }
}

function showMessage(title, text) {
  mount("message-page", title);
  byId("page-heading").textContent = title;
  byId("message-text").textContent = text;
}

/** Several requests may be refused at once: there is one form, and it keeps what it says. */
function askForToken(message) {
  const refused = token.get() !== null;
  token.forget();
  service = null;
  if (!byId("token-form")) openTokenForm();
  if (refused) {
    byId("token-error").textContent = message;
    byId("token-error").hidden = false;
  }
  byId("token").focus();
}

function openTokenForm() {
  mount("token-page", "Token");
  byId("who").textContent = "";
  byId("forget-token").hidden = true;
  byId("token-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    token.set(byId("token").value.trim());
    await show();
    if (!byId("token-form")) byId("page-heading").focus();
  });
}

function showWho() {
  byId("who").replaceChildren(
    element("span", { class: "muted" }, `version ${service.version}`),
    ...(service.name ? [` ${service.name} `, element("span", { class: "muted" }, `(may ${service.scope})`)] : []),
  );
  byId("forget-token").hidden = token.get() === null;
}

async function show() {
  const { job, query, unknown } = parseHash();
  if (unknown) return showMessage("No such page", "The address of this page cannot be read.");
  // The service says first who asks, so that nobody sees buttons that would be refused.
  try {
    service ??= await json("service");
  } catch (error) {
    if (error.status !== 401) showMessage("No answer", error.message);
    return;
  }
  showWho();
  if (job) {
    openJob(job, service, mount("job-page", job), (message) => showMessage(job, message));
  } else {
    openList(query, service, mount("list-page", "Jobs"));
  }
}

onUnauthorized(askForToken);

addEventListener("hashchange", async () => {
  const { id } = document.activeElement;
  await show();
  if (byId("token-form")) return;
  // Who uses the keyboard or listens goes on with the same control, as the filter of the list, or starts at the top.
  byId("page-heading").focus();
  if (byId("main").contains(byId(id))) byId(id).focus();
});

byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the fragment of the address is taken by the parts of the page
  byId("main").focus();
});

byId("forget-token").addEventListener("click", () => {
  token.forget();
  service = null;
  show();
});

show();
