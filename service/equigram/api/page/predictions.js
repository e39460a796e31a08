// Predictions with their images.

import { jobPath, json, objectUrl } from "./api.js";
import { byId, element, setOptions, setText, shown } from "./dom.js";
import { count, plural, value } from "./format.js";

const PAGE = 24;
const MOST_CONFUSIONS = 6;

/** Pairs of classes off the diagonal of a confusion matrix, the most frequent first. */
export function mostConfused(matrix, classes) {
  return matrix
    .flatMap((row, i) => row.map((number, j) => ({ number, true: classes[i], predicted: classes[j], off: i !== j })))
    .filter(({ number, off }) => off && number > 0)
    .sort((a, b) => b.number - a.number)
    .slice(0, MOST_CONFUSIONS);
}

/** The page of predictions of a matrix; thumbnails belong to a page and end with it. */
export function predictionsPanel(id, signal) {
  const [matrix, order] = [byId("prediction-matrix"), byId("prediction-order")];
  const [previous, next] = [byId("predictions-previous"), byId("predictions-next")];
  let offset = 0;
  let known = null;
  let page = new AbortController();

  function card(prediction, classes, scope) {
    const wrong = prediction.true !== null && prediction.predicted !== null && prediction.true !== prediction.predicted;
    const image = element("img", { alt: "", width: 96, height: 96 });
    objectUrl(jobPath(id, `/images/test/${prediction.index}.png`), scope).then(
      (url) => {
        image.src = url;
      },
      () => image.classList.add("unavailable"), // the words below it are what counts
    );
    const facts =
      classes === null
        ? [["value", prediction.values.map((number) => value(number)).join(", ")]]
        : [
            ["predicted", prediction.predicted],
            ["true", prediction.true],
            ["margin", prediction.margin === null ? null : value(prediction.margin, 3)],
          ];
    return element(
      "li",
      { "data-testid": "prediction", "data-index": prediction.index, class: wrong ? "wrong" : null },
      element("div", {}, image, ...(wrong ? [element("p", { class: "verdict" }, "wrong")] : [])),
      element("p", { class: "name", title: prediction.name }, prediction.name),
      element(
        "dl",
        {},
        ...facts
          .filter(([, text]) => text !== null)
          .map(([term, text]) => element("div", {}, element("dt", {}, term), element("dd", {}, text))),
      ),
    );
  }

  async function load() {
    page.abort();
    page = new AbortController();
    const scope = AbortSignal.any([signal, page.signal]);
    const [group, kernel] = matrix.value.split(" ");
    const query = new URLSearchParams({ group, kernel, sort: order.value, offset, limit: PAGE });
    const answer = await json(jobPath(id, `/predictions?${query}`), { signal: scope });
    const { predictions, total, classes } = answer;
    byId("predictions-panel").hidden = total === 0;
    byId("predictions").replaceChildren(...predictions.map((prediction) => card(prediction, classes, scope)));
    previous.disabled = offset === 0;
    next.disabled = offset + predictions.length >= total;
    setText(
      byId("predictions-range"),
      total ? `${count(offset + 1)} to ${count(offset + predictions.length)} of ${plural(total, "test image")}` : "",
    );
  }

  async function loadConfusions() {
    const { confusion, classes } = await json(jobPath(id, "/result"), { signal });
    const pairs = classes ? mostConfused(confusion[matrix.value] ?? [], classes) : [];
    byId("confusions-block").hidden = pairs.length === 0;
    byId("confusions").replaceChildren(
      ...pairs.map(({ number, true: truth, predicted }) =>
        element(
          "li",
          {},
          element("b", {}, truth),
          " taken for ",
          element("b", {}, predicted),
          `: ${plural(number, "image")}`,
        ),
      ),
    );
  }

  const show = () => shown(byId("predictions-error"), load);
  const showAll = () => shown(byId("predictions-error"), () => Promise.all([load(), loadConfusions()]));
  const turn = (pages) => {
    offset = Math.max(0, offset + pages * PAGE);
    show();
  };
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  order.addEventListener("change", () => {
    offset = 0;
    show();
  });
  matrix.addEventListener("change", () => {
    offset = 0;
    showAll();
  });

  return {
    update(job) {
      const state = JSON.stringify([job.solved, job.ended]);
      if (!job.test || job.solved.length === 0 || state === known) return;
      known = state;
      setOptions(
        matrix,
        job.solved.map(({ group, kernel }) => [`${group} ${kernel}`, `${group} ${kernel.toUpperCase()}`]),
      );
      showAll();
    },
  };
}
