// A number field of the settings that is left empty gets its value back, instead of its minimum, which Gradio would set.

for (const [name, listener] of Object.entries({
  focus: (field) => (field.dataset.before = field.value),
  blur: (field) => {
    if (field.value || !field.dataset.before) return;
    field.value = field.dataset.before;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  },
})) {
  const heard = (event) => event.target.matches?.("#ml-settings input[type=number]") && listener(event.target);
  document.addEventListener(name, heard, true); // while capturing, so that it runs before Gradio's listener
}
