// The Board: tables with bars. Names of adapters are untrusted, so they are inserted as text only.
const box = element.querySelector(".ml-board");
const find = (name) => box.querySelector(name);
const percent = (value) => Math.round(100 * value) + "%";

function make(tag, name, ...content) {
  const one = document.createElement(tag);
  if (name) one.className = name;
  one.append(...content);
  return one;
}

function bar(rate, chance) {
  const track = make("div", "ml-rate-track");
  track.setAttribute("role", "img");
  track.setAttribute("aria-label", `${percent(rate.value)}, from ${percent(rate.low)} to ${percent(rate.high)}`);
  const place = (name, from, to) => {
    const part = make("span", name);
    part.style.left = 100 * from + "%";
    part.style.width = 100 * (to - from) + "%";
    track.append(part);
  };
  place("ml-rate-bar", 0, rate.value);
  place("ml-rate-span", rate.low, rate.high);
  if (chance !== null && chance !== undefined) place("ml-rate-chance", chance, chance);
  return track;
}

function model(name, kind, weights) {
  const head = make("th", "ml-model", make("span", "ml-model-name", name));
  head.scope = "row";
  head.dataset.kind = kind;
  head.append(make("span", "ml-model-kind", weights ? `${kind} · ${weights}` : kind));
  return head;
}

function shareCells(rate, chance) {
  if (!rate) return [make("td", "", "–"), make("td", "ml-wide", "no votes yet")];
  const words = make("span", "ml-rate-words", `${percent(rate.low)} to ${percent(rate.high)}`);
  return [make("td", "ml-share", percent(rate.value)), make("td", "ml-wide", bar(rate, chance), words)];
}

function paint() {
  const now = props.value;
  if (!now || !now.phase) return;
  box.dataset.phase = now.phase;
  find(".ml-board-words").textContent = now.words || "";
  find(".ml-board-empty").hidden = now.phase !== "empty";
  find(".ml-board-votes").hidden = now.phase !== "votes";
  if (now.phase !== "votes") return;
  find(".ml-board-rows").replaceChildren(...now.models.map((one) => {
    const counts = [one.wins, one.losses, one.ties, one.all_bad, one.shown].map((count) => make("td", "ml-count-cell", String(count)));
    const line = make("tr", "", model(one.name, one.kind, one.weights.replace("sha256:", "").slice(0, 8)), ...shareCells(one.share, one.chance), ...counts);
    line.dataset.kind = one.kind;
    return line;
  }));
  find(".ml-board-pairs").replaceChildren(...now.pairs.map((one) => {
    const { first, second, share } = one;
    const head = model(`${first.name} over ${second.name}`, `${first.kind} over ${second.kind}`);
    const line = make("tr", "", head, ...shareCells(share, 0.5), make("td", "ml-count-cell", String(share.n)));
    line.dataset.kind = first.kind;
    return line;
  }));
  find(".ml-board-pairs").closest(".ml-board-scroll").hidden = now.pairs.length === 0;
}

watch("value", paint);
paint();
