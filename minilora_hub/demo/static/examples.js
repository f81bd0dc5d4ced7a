// Example prompts; choosing one runs it.
element.querySelector(".ml-examples").replaceChildren(...props.value.map(({ label, prompt }, index) => {
  const chip = document.createElement("button");
  const text = document.createElement("span");
  chip.type = "button";
  chip.className = "ml-chip";
  chip.title = prompt;
  text.textContent = prompt;
  if (label) chip.append(Object.assign(document.createElement("b"), { textContent: label }), " ");
  chip.append(text);
  chip.addEventListener("click", () => trigger("select", { index }));
  return chip;
}));
