// What became of ?adapter= in the page's address; its words are text, whoever wrote the link.
const box = element.querySelector(".ml-notice");

function paint() {
  const now = props.value;
  box.dataset.phase = (now && now.phase) || "none";
  box.querySelector(".ml-notice-words").textContent = (now && now.words) || "";
  box.querySelector(".ml-notice-back").hidden = box.dataset.phase !== "shown";
}

watch("value", paint);
paint();
