// The editor's style sheet, put into the page once. Colours are ComfyUI's variables, so themes are followed.

const STYLE_ID = "star-schedule-style";

const SHEET = `
.star-editor { --star-fg: var(--input-text, #ddd); --star-soft: var(--descrip-text, #999);
  --star-line: var(--border-color, #4e4e4e); --star-field: var(--comfy-input-bg, #222);
  display: flex; flex-direction: column; gap: 4px; box-sizing: border-box; height: 100%; width: 100%;
  color: var(--star-fg); font: 11px/1.2 Inter, system-ui, sans-serif; user-select: none; overflow: hidden; }
.star-editor * { box-sizing: border-box; }
.star-bar-tools { display: flex; gap: 6px; align-items: center; height: 24px; flex: none; }
.star-editor button, .star-editor select { height: 22px; padding: 0 8px; border-radius: 5px; max-width: 48%;
  border: 1px solid var(--star-line); background: var(--star-field); color: var(--star-fg); font: inherit;
  cursor: pointer; text-overflow: ellipsis; white-space: nowrap; overflow: hidden; }
.star-editor button:hover, .star-editor select:hover { border-color: var(--star-soft); }
.star-editor :focus-visible { outline: 2px solid #4f8ff7; outline-offset: -1px; }
.star-editor .star-bar-tools > button, .star-editor .star-bar-tools > select { flex: none; }
.star-said { margin-left: auto; color: var(--star-soft); font-variant-numeric: tabular-nums; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; text-align: right; }
.star-rows { display: flex; flex-direction: column; gap: 4px; flex: 1 0 auto; }
.star-row { min-height: 90px; display: flex; flex-direction: column; padding: 4px 6px 2px; border-radius: 6px;
  background: var(--star-field); flex: 1 0 0; }
.star-row-name { height: 14px; line-height: 14px; font-weight: 600; color: var(--star-colour); display: flex;
  justify-content: space-between; gap: 6px; }
@supports (color: color-mix(in srgb, red, blue)) {
  .star-row-name { color: color-mix(in srgb, var(--star-colour) 72%, var(--star-fg)); } }
.star-row-range { font-weight: 400; color: var(--star-soft); font-variant-numeric: tabular-nums; }
.star-bars { display: flex; gap: 3px; flex: 1; min-height: 0; touch-action: none; }
.star-slider { position: relative; flex: 1 1 0; min-width: 0; display: flex; flex-direction: column;
  cursor: ns-resize; border-radius: 3px; }
.star-value, .star-side { height: 12px; line-height: 12px; font-size: 9.5px; text-align: center;
  white-space: nowrap; overflow: hidden; font-variant-numeric: tabular-nums; flex: none; }
.star-slider[data-off] .star-value, .star-side { color: var(--star-soft); }
.star-track { position: relative; flex: 1; min-height: 0; border-radius: 3px; overflow: hidden;
  background: var(--star-line); background: color-mix(in srgb, var(--star-fg) 11%, transparent); }
.star-fill { position: absolute; left: 0; right: 0; background: var(--star-colour); border-radius: 2px;
  min-height: 2px; }
.star-slider[data-off] .star-fill { opacity: .45; }
.star-slider[data-idle] { opacity: .38; }
.star-slider:hover .star-fill, .star-slider:focus .star-fill, .star-slider[data-held] .star-fill {
  filter: brightness(1.15); }
.star-slider:hover .star-side, .star-slider:focus .star-side { color: var(--star-fg); font-weight: 700; }
.star-bars[data-crowded] .star-value { font-size: 8px; letter-spacing: -.03em; }
.star-bars[data-crowded] .star-side { font-size: 8.5px; }
.star-editor input.star-typed { position: absolute; z-index: 2; top: 0; left: 50%; transform: translateX(-50%);
  width: max(100%, 46px); height: 18px; padding: 0 2px; border: 1px solid var(--star-colour);
  border-radius: 3px; background: var(--comfy-menu-bg, #353535); color: var(--star-fg); font: inherit;
  text-align: center; user-select: text; }
.star-editor input.star-typed:invalid, .star-editor input.star-typed[aria-invalid] {
  border-color: var(--error-text, #ff4444); color: var(--error-text, #ff4444); }
.star-message { flex: 1; min-height: 0; overflow: auto; padding: 8px; border-radius: 6px; line-height: 1.4;
  background: var(--star-field); border: 1px solid var(--star-line); user-select: text; }
.star-message[data-kind="error"] { border-color: var(--error-text, #ff4444); }
.star-message pre { margin: 6px 0; font: 11px/1.3 ui-monospace, Menlo, Consolas, monospace; white-space: pre;
  overflow-x: auto; }
.star-message mark { background: none; color: var(--error-text, #ff4444); font-weight: 700;
  text-decoration: underline wavy; text-underline-offset: 3px; }
.star-note { flex: none; min-height: 16px; max-height: 46px; overflow: auto; color: var(--star-soft);
  line-height: 1.3; user-select: text; }
.star-note[data-kind="warning"] { color: var(--star-fg); border-left: 3px solid #d99a1c; padding-left: 6px; }
.star-editor [hidden] { display: none; }
`;

/** Put the style sheet into the page, once. */
export function addStyle() {
  if (document.getElementById(STYLE_ID)) return;
  const style = document.createElement("style");
  style.id = STYLE_ID;
  style.textContent = SHEET;
  document.head.append(style);
}
