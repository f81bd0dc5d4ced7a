// Data of a comparison, read from the stage that the server sends (see page_state.py). Nothing is drawn here.

// The longest common subsequence of two growing sequences. Adding an item costs the length of the other sequence.
class Common {
  constructor() {
    this.a = [];
    this.b = [];
    this.lengths = [[0]]; // lengths[i][j]: of the first i items of a and the first j of b
  }

  addA(item) {
    this.a.push(item);
    const above = this.lengths[this.a.length - 1];
    const row = [0];
    for (let j = 1; j <= this.b.length; j++) {
      row.push(this.b[j - 1] === item ? above[j - 1] + 1 : Math.max(above[j], row[j - 1]));
    }
    this.lengths.push(row);
  }

  addB(item) {
    this.b.push(item);
    const j = this.b.length;
    this.lengths[0].push(0);
    for (let i = 1; i <= this.a.length; i++) {
      const row = this.lengths[i];
      const above = this.lengths[i - 1];
      row.push(this.a[i - 1] === item ? above[j - 1] + 1 : Math.max(above[j], row[j - 1]));
    }
  }

  // The positions of its items among the first `i` of a and the first `j` of b, as two sets.
  kept(i, j) {
    const inA = new Set();
    const inB = new Set();
    while (i > 0 && j > 0) {
      if (this.a[i - 1] === this.b[j - 1]) {
        inA.add(--i);
        inB.add(--j);
      } else if (this.lengths[i - 1][j] >= this.lengths[i][j - 1]) i--;
      else j--;
    }
    return { inA, inB };
  }
}

// One column: its tokens {t, p, i, l, a, r}, each with its main expert, and how they compare with the base's.
class Answer {
  constructor(about) {
    this.about = about;
    this.tokens = [];
    this.read = 0;
    this.common = new Common(); // a: the base's tokens, b: this answer's
  }

  // Parse the part appended to the log; return the number of new tokens.
  take(log) {
    const end = log.lastIndexOf("\n");
    if (end < this.read) return 0;
    const lines = log.slice(this.read, end).split("\n");
    this.read = end + 1;
    for (const line of lines) {
      const token = JSON.parse(line);
      token.expert = token.r ? mainExpert(token.r) : null;
      token.key = token.i === undefined ? token.t : token.i;
      this.tokens.push(token);
    }
    return lines.length;
  }

  // The index of the first token that differs from the base's at the same position.
  fork(base) {
    const both = Math.min(this.tokens.length, base.tokens.length);
    for (let i = 0; i < both; i++) if (this.tokens[i].key !== base.tokens[i].key) return i;
    return null;
  }
}

// ---- experts ----

// Layers are [expert, weight, expert, weight, …] in thousandths; the main expert has the largest sum over the layers.
function mainExpert(layers) {
  const sums = new Map();
  for (const layer of layers) {
    for (let i = 0; i < layer.length; i += 2) sums.set(layer[i], (sums.get(layer[i]) || 0) + layer[i + 1]);
  }
  let best = null;
  for (const [expert, sum] of sums) {
    if (best === null || sum > sums.get(best) || (sum === sums.get(best) && expert < best)) best = expert;
  }
  return best;
}

// Mean weight of each expert in each layer over the first `count` tokens, from 0 to 1: one row an expert.
function expertUse(tokens, experts, count) {
  const routed = tokens.slice(0, count).filter((token) => token.r);
  const layers = routed.length ? routed[0].r.length : 0;
  const use = Array.from({ length: experts }, () => new Array(layers).fill(0));
  for (const token of routed) {
    token.r.forEach((layer, at) => {
      for (let i = 0; i < layer.length; i += 2) use[layer[i]][at] += layer[i + 1] / 1000 / routed.length;
    });
  }
  return use;
}

// What the letters above tokens mean, with the number of experts that served them.
function lettersWords(answers) {
  const routed = answers.map(({ about, tokens }) => [about.experts, tokens.flatMap(({ r }) => r || [])]);
  const some = routed.filter(([, layers]) => layers.length);
  if (!some.length) return "";
  const active = [...new Set(some.flatMap(([, layers]) => layers.map((layer) => layer.length / 2)))].sort((a, b) => a - b);
  const range = active.length > 1 ? `${active[0]} to ${active.at(-1)}` : active[0];
  const experts = [...new Set(some.map(([experts]) => experts))].join(" or ");
  return `Letters: the expert with the most weight. In each layer ${range} of ${experts} experts serve a token; choose one to see which.`;
}

// What kind of text a token is; `before` is the text before it.
function tokenType(text, before) {
  if (!text) return "end";
  if (!text.trim()) return "space";
  if (/\d/.test(text)) return "digit";
  if (!/\p{L}/u.test(text)) return "punctuation";
  return /^\p{L}/u.test(text) && /\p{L}$/u.test(before) ? "rest of a word" : "start of a word";
}

// For each type of token in an answer, how many there are, and the share of each expert among their main experts.
function typeShares(tokens, experts) {
  const counts = new Map();
  let before = "";
  for (const token of tokens) {
    if (token.expert !== null) {
      const type = tokenType(token.t, before);
      if (!counts.has(type)) counts.set(type, new Array(experts).fill(0));
      counts.get(type)[token.expert]++;
    }
    before += token.t;
  }
  return [...counts].map(([type, of]) => {
    const total = of.reduce((sum, count) => sum + count, 0);
    return { title: `${type} (${total})`, total, shares: of.map((count) => count / total) };
  }).sort((one, other) => other.total - one.total);
}

// Share of each expert among the chosen slots of one layer.
function slotShares(tokens, experts, layer) {
  const shares = new Array(experts).fill(0);
  for (const { r } of tokens) {
    for (let i = 0; i < r[layer].length; i += 2) shares[r[layer][i]] += 2 / r[layer].length / tokens.length;
  }
  return shares;
}

const letterOf = (expert) => String.fromCharCode(65 + (expert % 26)) + (expert >= 26 ? Math.floor(expert / 26) : "");
const hueOf = (expert) => `var(--ml-e${expert % 8})`;

// ---- words ----

function percent(share) {
  if (share > 0 && share < 0.001) return "<0.1 %";
  return (share < 0.1 && share > 0 ? (100 * share).toFixed(1) : Math.round(100 * share)) + " %";
}

// Settings of sampling as words, without those that have no effect.
function settingWords(settings) {
  const idle = settings.temperature === 0 ? ["top_p", "top_k", "seed"] : [];
  const shown = Object.entries(settings).filter(([name, value]) => !idle.includes(name) && name !== "stop" && value !== null);
  return shown.map(([name, value]) => `${name.replaceAll("_", " ")} ${value === "" ? "none" : value}`).join(", ");
}

const digits = (value, count) => (value === null || value === undefined ? "–" : value.toFixed(count));

// A token's text with visible symbols for spaces, line ends and control characters.
const CONTROLS = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
function visible(text) {
  const shown = text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
  return shown.replace(CONTROLS, (one) => "\\u" + one.charCodeAt(0).toString(16).padStart(4, "0")) || "∅";
}

// Create an element with classes and a text, inserted as text and never as HTML.
function make(tag, classes = "", text = null) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text !== null) made.textContent = text;
  return made;
}
