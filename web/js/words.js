// What the editor says, in the languages of the pack. Quantities keep the names that the text has for them.

const WORDS = {
  en: {
    presets: "Presets…",
    presetsTip: "Write a preset into the text, made for these sides",
    fill: "Sides from model",
    fillTip: "Write the sides of the connected Load STAR into the text",
    scale: "scale {0} of {1} · side {2}",
    every: "drag a bar · double-click for a number",
    named: "The text is the preset {0}: its values are made for the model that draws. Choose it in the menu to see and change them.",
    linked: "The text comes over a link, so there is nothing to edit here.",
    show: "Show in text",
    noModel: "No Load STAR is connected to the input model.",
    filled: "Sides of {0}.",
    other: "The model draws {0} scales ({1}), this text has {2}. Nothing was changed: choose a preset to start anew for the model, or add a line `stretch yes`.",
    differs: "The connected model draws {0}, this text is for {1}.",
    failed: "The server did not answer: {0}",
    log: "log",
  },
  zh: {
    presets: "预设…",
    presetsTip: "把预设写入文本，并适配当前各尺度的边长",
    fill: "从模型读取边长",
    fillTip: "把所连接的 Load STAR 的各尺度边长写入文本",
    scale: "第 {0}/{1} 尺度 · 边长 {2}",
    every: "拖动柱条 · 双击输入数字",
    named: "文本是预设 {0}：数值会按实际绘制的模型生成。在菜单中选择它即可查看并修改。",
    linked: "文本来自连线，此处无法编辑。",
    show: "在文本中定位",
    noModel: "输入 model 没有连接 Load STAR。",
    filled: "已填入 {0} 的边长。",
    other: "模型有 {0} 个尺度（{1}），文本为 {2} 个。未作任何改动：请选择预设为该模型重新开始，或添加一行 `stretch yes`。",
    differs: "所连接的模型为 {0}，文本为 {1}。",
    failed: "服务器没有响应：{0}",
    log: "对数",
  },
  ja: {
    presets: "プリセット…",
    presetsTip: "プリセットを、このサイズ用にテキストへ書き込みます",
    fill: "モデルのサイズを使う",
    fillTip: "接続された Load STAR のサイズをテキストへ書き込みます",
    scale: "スケール {0}/{1} · 一辺 {2}",
    every: "ドラッグ · ダブルクリックで数値",
    named: "テキストはプリセット {0} です。値は描画するモデルに合わせて作られます。メニューで選ぶと表示・変更できます。",
    linked: "テキストはリンクから来るため、ここでは編集できません。",
    show: "テキストで表示",
    noModel: "入力 model に Load STAR が接続されていません。",
    filled: "{0} のサイズを記入しました。",
    other: "モデルのスケール数は {0}（{1}）、テキストは {2} です。何も変更していません。プリセットを選んでモデル用に作り直すか、`stretch yes` の行を加えてください。",
    differs: "接続されたモデルは {0}、テキストは {1} 用です。",
    failed: "サーバーが応答しません: {0}",
    log: "対数",
  },
};

/** What a key says in a language (`zh-TW` falls back to `zh`, an unknown one to English). */
export function say(locale, key, ...values) {
  const words = WORDS[locale] ?? WORDS[String(locale).split("-")[0]] ?? WORDS.en;
  return words[key].replace(/\{(\d)\}/g, (_, index) => values[Number(index)]);
}
