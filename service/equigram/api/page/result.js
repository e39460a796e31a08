// What came of a job: scores and figures.

import { jobPath, json, objectUrl, segments } from "./api.js";
import { byId, element, shown } from "./dom.js";
import { NOTHING, count, value } from "./format.js";

/** What a figure shows, by the beginning of its name, for those who do not see it. */
const FIGURES = {
  gram: (matrix) => [
    `${matrix} Gram matrix`,
    `Heat map of the ${matrix} correlations of the training images, sorted by class`,
  ],
  confusion: (matrix) => [
    `${matrix} confusion matrix`,
    `Confusion matrix of the ${matrix} predictions: true classes in rows, predicted ones in columns`,
  ],
  spectrum: () => ["Spectrum", "Eigenvalues of the train matrices by rank, on logarithmic axes"],
  "learning-curves": () => [
    "Learning curves",
    "Accuracy on the test images by number of training images, a curve for each matrix",
  ],
};

/** "gram-C4-ntk" → its caption and its description. */
function describe(name) {
  const kind = Object.keys(FIGURES).find((start) => name === start || name.startsWith(`${start}-`));
  if (!kind) return [name, `Figure ${name}`];
  const [group, kernel] = name.slice(kind.length + 1).split("-");
  return FIGURES[kind](kernel ? `${group} ${kernel.toUpperCase()}` : "");
}

/** Whether the job predicts with it, and it has learnt from all images: what a reader looks for. */
const isFinal = (score) => score.chosen && score.train_size === null;

function scoreRow(score) {
  const number = (text) => element("td", { class: "number" }, text);
  return element(
    "tr",
    { "data-testid": "score-row", class: isFinal(score) ? "final" : null },
    element("th", { scope: "row" }, score.group),
    element("td", {}, score.kernel.toUpperCase()),
    number(score.accuracy === null ? NOTHING : `${(100 * score.accuracy).toFixed(1)} %`),
    number(score.mse === null ? NOTHING : value(score.mse)),
    number(value(score.ridge)),
    number(score.train_size === null ? "all" : `${count(score.train_size)} per class`),
    element("td", {}, [score.chosen ? "chosen" : null, score.warning].filter(Boolean).join("; ")),
  );
}

/** The panels of the scores and the figures. */
export function resultPanels(id, signal) {
  let shownState = null;
  let shownFigures = null;
  let figures = new AbortController();

  async function showScores() {
    const { scores } = await json(jobPath(id, "/result"), { signal });
    // The order of the service but for what is chosen, which comes first.
    const rank = (score) => (isFinal(score) ? 0 : score.chosen ? 1 : 2);
    const sorted = [...scores].sort((a, b) => rank(a) - rank(b));
    byId("score-rows").replaceChildren(...sorted.map(scoreRow));
    byId("result-panel").hidden = scores.length === 0;
  }

  async function figure(name, scope) {
    const [caption, description] = describe(name);
    const url = await objectUrl(jobPath(id, `/figures${segments(`${name}.png`)}`), scope);
    return element(
      "figure",
      { "data-testid": "figure", "data-figure": name },
      element("a", { href: url, target: "_blank", rel: "noopener" }, element("img", { src: url, alt: description })),
      element("figcaption", {}, caption),
    );
  }

  async function showFigures(names) {
    figures.abort();
    figures = new AbortController();
    const scope = AbortSignal.any([signal, figures.signal]);
    const nodes = await Promise.all(names.map((name) => figure(name, scope)));
    byId("figures").replaceChildren(...nodes);
  }

  return {
    update(job) {
      // A resumed job replaces what it had: its end tells the old from the new.
      const state = JSON.stringify([job.solved, job.ended]);
      if (job.solved.length > 0 && state !== shownState) {
        shownState = state;
        shown(byId("result-error"), showScores);
      }
      const names = JSON.stringify([job.figures, job.ended]);
      if (job.figures.length > 0 && names !== shownFigures) {
        shownFigures = names;
        byId("figures-panel").hidden = false;
        shown(byId("figures-error"), () => showFigures(job.figures));
      }
    },
  };
}
